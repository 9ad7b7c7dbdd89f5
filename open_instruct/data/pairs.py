"""Examples of encoder–decoders: a source, which is everything before the last answer, and that answer as the target.

An example keeps the form of all others, {"input_ids", "spans"}: its ids are the source's, then the target's, and its
only span is the target. So tables, caches, plans and questions need not know of pairs; only batches take them apart.

Source and target are tokenised apart, with the special tokens that the tokenizer puts around each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, plan
from open_instruct.data.chat import Messages
from open_instruct.data.packing import IGNORE, NO_LABELS, Packing, Padding
from open_instruct.data.spans import Spans
from open_instruct.data.tools import has_calls
from open_instruct.errors import InputError

# Entry of tokenizer_config.json: how many tokens of a merged soft prompt the tokenizer writes before each text.
BEFORE_SOURCES = "merged_soft_prompt_tokens"


def source_ids(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages]) -> list[list[int]]:
    """Return the source of each conversation that is to be answered.

    Raises:
        InputError: the template can't hold one, or writes nothing.
    """
    texts, _ = chat.render_texts(tokenizer, batch, add_generation_prompt=True)
    if not all(text.strip() for text in texts):
        raise InputError("the template writes nothing for a question: use another with --chat_template_name")
    ids: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return ids


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages], max_length: int
) -> tuple[list[list[int]], list[Spans]]:
    """Return the ids of each conversation up to its last answer, source then target, and the target's span.

    Args:
        tokenizer: with its chat template.
        batch: conversations. What follows the last answer is left out.
        max_length: most tokens of source and target together; see `fit_pair`.

    Raises:
        InputError: the template can't hold a conversation, or one has no answer.
    """
    lasts = [max((i for i, message in enumerate(one) if message["role"] == "assistant"), default=0) for one in batch]
    if not all(lasts):
        raise InputError("a conversation has no answer after a question")
    if any(has_calls(one[last]) for one, last in zip(batch, lasts, strict=True)):
        raise InputError("an answer calls tools, and an encoder–decoder learns the text of answers alone: remove it")
    sources = source_ids(tokenizer, [one[:last] for one, last in zip(batch, lasts, strict=True)])
    answers = [str(one[last]["content"]) for one, last in zip(batch, lasts, strict=True)]
    targets = tokenizer(text_target=answers, verbose=False)["input_ids"]
    merged = tokenizer.init_kwargs.get(BEFORE_SOURCES, 0)
    ids, spans = [], []
    for source, whole in zip(sources, targets, strict=True):
        target = whole[merged:]
        row, span = fit_pair([*source, *target], [(len(source), len(source) + len(target))], max_length)
        ids.append(row)
        spans.append(span)
    return ids, spans


def fit_pair(ids: list[int], spans: Spans, max_length: int) -> tuple[list[int], Spans]:
    """Return a pair of at most `max_length` tokens, at least 2, in both of which the last token stays: it ends a text.

    What is too long loses tokens of its source, and of its target where that alone is too long.
    """
    if len(ids) <= max_length:
        return ids, spans
    ((start, end),) = spans
    source, target = ids[:start], ids[start:end]
    if len(target) > max(1, max_length - 1):
        target = [*target[: max(0, max_length - 2)], target[-1]]
    kept = max(1, max_length - len(target))
    source = [*source[: kept - 1], source[-1]]
    return [*source, *target], [(kept, kept + len(target))]


def split(example: dict[str, Any]) -> tuple[list[int], list[int], bool]:
    """Return an example's source and target, and whether the target is labelled."""
    ids, spans = example["input_ids"], example["spans"]
    start, end = spans[-2:] if spans else (1, len(ids))
    return ids[:start], ids[start:end], bool(spans)


def shifted(target: Sequence[int], decoder_start: int) -> list[int]:
    """Return what the decoder reads to predict a target."""
    return [decoder_start, *target[:-1]]


def pack_pairs(examples: Sequence[dict[str, Any]], decoder_start: int) -> dict[str, Any]:
    """Put pairs one after another into an encoder's row and a decoder's row, without padding.

    Returns:
        input_ids: [1, S]
        decoder_input_ids: [1, T], of each target what precedes its tokens.
        lengths: (source, target) of each example.
        target_positions: [N], indices into the decoder's row.
        targets: [N]
    """
    parts = [split(example) for example in examples]
    labelled = np.concatenate([np.full(len(target), is_labelled) for _, target, is_labelled in parts])
    targets = np.concatenate([np.asarray(target, dtype=np.int64) for _, target, _ in parts])
    read = [token for _, target, _ in parts for token in shifted(target, decoder_start)]
    return {
        "input_ids": torch.tensor([[token for source, _, _ in parts for token in source]]),
        "decoder_input_ids": torch.tensor([read]),
        "lengths": tuple((len(source), len(target)) for source, target, _ in parts),
        "target_positions": torch.from_numpy(np.flatnonzero(labelled)),
        "targets": torch.from_numpy(targets[labelled]),
    }


def pad_pairs(examples: Sequence[dict[str, Any]], pad_token_id: int, decoder_start: int) -> dict[str, torch.Tensor]:
    """Right-pad sources to the longest, and targets to the longest.

    Returns:
        input_ids and attention_mask [B, S], decoder_input_ids and labels [B, T].
    """
    parts = [split(example) for example in examples]
    longest = max(len(source) for source, _, _ in parts), max(len(target) for _, target, _ in parts)
    batch = {
        "input_ids": torch.full((len(parts), longest[0]), pad_token_id),
        "attention_mask": torch.zeros((len(parts), longest[0]), dtype=torch.long),
        "decoder_input_ids": torch.full((len(parts), longest[1]), pad_token_id),
        "labels": torch.full((len(parts), longest[1]), IGNORE),
    }
    for row, (source, target, is_labelled) in enumerate(parts):
        batch["input_ids"][row, : len(source)] = torch.tensor(source)
        batch["attention_mask"][row, : len(source)] = 1
        batch["decoder_input_ids"][row, : len(target)] = torch.tensor(shifted(target, decoder_start))
        if is_labelled:
            batch["labels"][row, : len(target)] = torch.tensor(target)
    return batch


def bounds_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, end) of segments that follow one another."""
    ends = np.cumsum([0, *lengths]).tolist()
    return list(pairwise(ends))


@dataclass(frozen=True)
class PairPacking(Packing):
    """An encoder's row and a decoder's row, of up to `max_tokens` tokens together; a longer pair stands alone."""

    decoder_start: int = 0
    num_virtual_tokens: int = 0  # before each source

    def micro_batches(self, indices: Sequence[int], lengths: np.ndarray, rank: int, num_ranks: int) -> list[list[int]]:
        """See `Batching`."""
        whole = np.asarray(lengths) + self.num_virtual_tokens
        bound = max(self.max_tokens, max(int(whole[i]) for i in indices)) if len(indices) else self.max_tokens
        return plan.balanced_rows(indices, whole, bound, rank, num_ranks)

    def positions(self, chosen: Sequence[int], lengths: np.ndarray, num_virtual_tokens: int) -> int:
        """See `Batching`; a prefix of keys and values takes no position of the rows."""
        return sum(int(lengths[i]) + self.num_virtual_tokens for i in chosen)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `pack_pairs`."""
        return pack_pairs(examples or NO_LABELS, self.decoder_start)


@dataclass(frozen=True)
class PairPadding(Padding):
    """Up to `size` pairs, padded."""

    decoder_start: int = 0

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `pad_pairs`."""
        return pad_pairs(examples or NO_LABELS, self.pad_token_id, self.decoder_start)
