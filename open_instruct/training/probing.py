"""The loss of a model as it is on a few of a run's own examples: what starts and rates are judged by before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from open_instruct.data.collate import Batching, to_device
from open_instruct.data.dataset import Examples
from open_instruct.data.plan import Plan


def first_examples(plan: Plan, number: int) -> list[int]:
    """Indices of the first examples that a run would train on: the same on 1 or 8 processes."""
    found: list[int] = []
    for step in range(plan.num_steps):
        found += plan.examples(step).tolist()
        if len(found) >= number:
            break
    return found[:number]


def micro_batches(batching: Batching, examples: Examples, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Examples as tensors, in as many micro-batches as they need."""
    return [
        batching.collate([examples[i] for i in rows])
        for rows in batching.micro_batches(indices, examples.lengths, 0, 1)
    ]


@torch.no_grad()
def mean_loss(accelerator: Any, model: torch.nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Nats per labelled token of micro-batches.

    Args:
        accelerator: for device and precision.
        model: a `TrainingModel`, not prepared yet.
        batches: of tensors.
    """
    was_training = model.training
    model.eval()
    with accelerator.autocast():
        sums = [torch.stack(model(**to_device(batch, accelerator.device))).double() for batch in batches]
    model.train(was_training)
    total = torch.stack(sums).sum(0)
    return (total[0] / total[1]).item()
