"""Examples → the tensors of one padded micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORE = -100  # label of a position that is nobody's target


def labels_of(ids: Sequence[int], spans: Sequence[int]) -> list[int]:
    """The ids inside the spans [start, end, start, end, …], IGNORE elsewhere."""
    labels = [IGNORE] * len(ids)
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        labels[start:end] = ids[start:end]
    return labels


def pad(examples: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-pad examples {"input_ids", "spans"} to the longest.

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
    batch["labels"][:, 0] = IGNORE  # no token of the conversation comes before the first
    return batch


def nothing(pad_token_id: int) -> dict[str, torch.Tensor]:
    """A micro-batch without a label, for a process that has no example left but must take part in the step."""
    ids = torch.full((1, 2), pad_token_id)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, IGNORE)}
