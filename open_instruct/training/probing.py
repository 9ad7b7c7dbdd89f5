"""The loss of a model as it is on a few of a run's own micro-batches: what starts and rates are judged by before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from open_instruct.data.collate import Batching, to_device
from open_instruct.data.dataset import Examples
from open_instruct.data.plan import Plan


def micro_batches(batching: Batching, examples: Examples, plan: Plan, number: int) -> list[dict[str, Any]]:
    """The first micro-batch of each of the first steps, as tensors."""
    found = []
    for step in range(number):
        rows = batching.cut(plan.examples(step).tolist(), examples.lengths, 0, 1)[0]
        found.append(batching.tensors([examples[i] for i in rows]))
    return found


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
