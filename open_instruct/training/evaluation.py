"""Held-out loss, on every process's share of the rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from open_instruct.data.collate import Batching, to_device
from open_instruct.data.dataset import Examples


@torch.no_grad()
def held_out_loss(
    accelerator: Any, training_model: torch.nn.Module, examples: Examples, batching: Batching, adapter: bool = True
) -> tuple[float, int]:
    """Mean loss over the labelled tokens of all examples.

    Args:
        accelerator: gathers the processes' sums.
        training_model: a `TrainingModel`, as prepared by accelerate.
        examples: held-out examples; the same on every process.
        batching: how micro-batches are made.
        adapter: False switches the adapter off: the base model's loss.

    Returns:
        (nats per labelled token, number of labelled tokens).
    """
    inner = accelerator.unwrap_model(training_model)
    was_training = training_model.training
    training_model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    batches = batching.micro_batches(
        range(len(examples)), examples.lengths, accelerator.process_index, accelerator.num_processes
    )
    with nullcontext() if adapter else inner.without_adapter():
        for chosen in batches:
            loss, count = training_model(
                **to_device(batching.collate([examples[i] for i in chosen]), accelerator.device)
            )
            total += torch.stack([loss.double(), count.double()])
    total = accelerator.reduce(total, reduction="sum")
    training_model.train(was_training)
    return (total[0] / total[1]).item(), int(total[1].item())
