"""Examples → micro-batches → tensors: padded rows, or one packed row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from open_instruct.data import plan

IGNORE = -100  # label of a token on which nothing is learned


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """Return the ids inside the spans [start, end, start, end, …], and IGNORE elsewhere."""
    labels = [IGNORE] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels


def pad(examples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad examples {"input_ids", "spans"} to the longest.

    An example's first token is never labelled: no token of the conversation comes before it to predict it.

    Returns:
        input_ids, attention_mask and labels, each [B, T]; labels are not shifted.
    """
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {
        "input_ids": torch.full((len(examples), longest), pad_token_id),
        "attention_mask": torch.zeros((len(examples), longest), dtype=torch.long),
        "labels": torch.full((len(examples), longest), IGNORE),
    }
    for row, example in enumerate(examples):
        ids = torch.as_tensor(example["input_ids"])
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.as_tensor(labels_of(example["input_ids"], example["spans"]))
    batch["labels"][:, 0] = IGNORE
    return batch


def pack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put examples {"input_ids", "spans"} one after another into a row without padding.

    An example's first token is never a target: the token before it belongs to another example.

    Returns:
        input_ids: [1, T]
        position_ids: [1, T], from 0 for each example.
        lengths: number of tokens of each example.
        target_positions: [N], for each target the index into input_ids of the position whose hidden state predicts it.
            This is the position before the one at which the target itself stands.
        targets: [N], the labelled tokens.
    """
    lengths = tuple(len(example["input_ids"]) for example in examples)
    ids = np.concatenate([np.asarray(example["input_ids"], dtype=np.int64) for example in examples])
    labels = np.concatenate([np.asarray(labels_of(e["input_ids"], e["spans"]), dtype=np.int64) for e in examples])
    starts = np.cumsum((0, *lengths[:-1]))
    labels[starts] = IGNORE
    labelled = np.flatnonzero(labels != IGNORE)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, lengths))[None],
        "lengths": lengths,
        "target_positions": torch.from_numpy(labelled - 1),
        "targets": torch.from_numpy(labels[labelled]),
    }


class Batching(Protocol):
    """Makes micro-batches from the examples of a step."""

    def micro_batches(self, indices: Sequence[int], lengths: np.ndarray, rank: int, num_ranks: int) -> list[list[int]]:
        """Return the micro-batches of one process. Every process has the same number of them; some may be empty.

        Args:
            indices: the step's examples.
            lengths: tokens of every example of the data set.
            rank: the process, counted from 0.
            num_ranks: number of processes.
        """

    def positions(self, chosen: Sequence[int], lengths: np.ndarray, num_before: int) -> int:
        """Return the number of positions of a micro-batch, padding and what stands before examples included.

        Args:
            chosen: the examples of the micro-batch, at least one.
            lengths: tokens of every example of the data set.
            num_before: positions before each example: virtual tokens and hard prompt.
        """

    def halved(self, indices: Sequence[int], lengths: np.ndarray) -> Packing | None:
        """Return a batching into rows of half the length that these examples fill now, or None if that can't be.

        Args:
            indices: the step's examples.
            lengths: tokens of every example of the data set.
        """

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the arguments of the forward pass.

        Without examples this is a micro-batch without labels, for a process that has nothing left.
        """


@dataclass(frozen=True)
class Padding:
    """Up to `size` rows, padded to the longest; each begins with the hard prompt, if there is one."""

    size: int
    pad_token_id: int
    hard_prompt: tuple[int, ...] = ()

    def micro_batches(self, indices: Sequence[int], lengths: np.ndarray, rank: int, num_ranks: int) -> list[list[int]]:
        """See `Batching`."""
        return plan.micro_batches(indices, lengths, self.size, rank, num_ranks)

    def positions(self, chosen: Sequence[int], lengths: np.ndarray, num_before: int) -> int:
        """See `Batching`."""
        return len(chosen) * (max(int(lengths[i]) for i in chosen) + num_before)

    def halved(self, indices: Sequence[int], lengths: np.ndarray) -> Packing | None:
        """See `Batching`."""
        return None

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask and labels, each [B, T]; see `pad`."""
        behind = [behind_context({**example, "context": self.hard_prompt}, 0) for example in examples or NO_LABELS]
        return pad(behind if self.hard_prompt else examples or NO_LABELS, self.pad_token_id)


@dataclass(frozen=True)
class Packing:
    """One row of up to `max_tokens` tokens, not counting virtual ones, a hard prompt's and shared ones.

    Args:
        max_tokens: see above.
        beginning: tokens that every example begins with, which stand in the row once; see `beginnings`.
    """

    max_tokens: int
    beginning: tuple[int, ...] = field(default=(), kw_only=True)

    def micro_batches(self, indices: Sequence[int], lengths: np.ndarray, rank: int, num_ranks: int) -> list[list[int]]:
        """See `Batching`."""
        return plan.balanced_rows(indices, lengths - len(self.beginning), self.max_tokens, rank, num_ranks)

    def positions(self, chosen: Sequence[int], lengths: np.ndarray, num_before: int) -> int:
        """See `Batching`."""
        num_shared = len(self.beginning)
        return sum(int(lengths[i]) - num_shared for i in chosen) + num_shared + num_before

    def halved(self, indices: Sequence[int], lengths: np.ndarray) -> Packing | None:
        """See `Batching`. The longest example of the data set must fit."""
        own = lengths - len(self.beginning)
        longest_row = max(int(own[row].sum()) for row in self.micro_batches(indices, lengths, 0, 1))
        bound = max(longest_row // 2, int(own.max()))
        return replace(self, max_tokens=bound) if bound < longest_row else None

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one packed row, see `pack`; and as `beginning` [S] the tokens that it shares, if there are some."""
        if not self.beginning or not examples:
            return pack(examples or NO_LABELS)
        row = pack([behind_beginning(example, self.beginning) for example in examples])
        return {**row, "beginning": torch.tensor(self.beginning)}


@dataclass(frozen=True)
class PackingBehindContexts(Packing):
    """A packed row, and beside it the row of the same examples with their own contexts before them.

    Its length is not bounded: nothing is kept of it for a backward pass.
    """

    num_shared: int = 0  # first tokens of every example that its context begins with, too

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return one packed row, and as `teacher_…` the other one without its targets, which are the same."""
        whole = pack([behind_context(example, self.num_shared) for example in examples or NO_LABELS])
        del whole["targets"]
        return {**super().collate(examples), **{f"teacher_{name}": value for name, value in whole.items()}}


def behind_beginning(example: dict[str, Any], beginning: tuple[int, ...]) -> dict[str, Any]:
    """Return an example {"input_ids", "spans"} without the tokens that it shares with all others."""
    ids, num_shared = example["input_ids"], len(beginning)
    spans = [bound - num_shared for bound in example["spans"]]
    assert tuple(ids[:num_shared]) == beginning and all(bound > 0 for bound in spans), "an example begins otherwise"
    return {"input_ids": ids[num_shared:], "spans": spans}


def behind_context(example: dict[str, Any], num_shared: int) -> dict[str, Any]:
    """Return an example {"input_ids", "spans"} with its "context" before it, if it has one.

    Args:
        example: the example. Its first token is not labelled in the result either.
        num_shared: see `PackingBehindContexts`.
    """
    ids, spans, context = example["input_ids"], example["spans"], example.get("context", ())
    if not context:
        return example
    moved = len(context) - num_shared
    return {"input_ids": [*context, *ids[num_shared:]], "spans": [max(bound, 1) + moved for bound in spans]}


NO_LABELS = [{"input_ids": [0, 0], "spans": []}]  # stands in where a process has no example


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a micro-batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
