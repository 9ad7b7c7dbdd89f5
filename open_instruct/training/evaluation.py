"""Held-out loss, on every process's share of the rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from open_instruct.data import collate, plan
from open_instruct.data.dataset import Examples


@torch.no_grad()
def held_out_loss(
    accelerator: Any, training_model: torch.nn.Module, examples: Examples, batch_size: int, pad_token_id: int, adapter: bool = True
) -> tuple[float, int]:
    """Mean loss over the labelled tokens of all examples.

    Args:
        accelerator: gathers the processes' sums.
        training_model: a `TrainingModel`, as prepared by accelerate.
        examples: held-out examples; the same on every process.
        batch_size: examples in a micro-batch.
        pad_token_id: fills short rows.
        adapter: False switches the adapter off: the base model's loss.

    Returns:
        (nats per labelled token, number of labelled tokens).
    """
    inner = accelerator.unwrap_model(training_model).model
    was_training = training_model.training
    training_model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    batches = plan.micro_batches(range(len(examples)), examples.lengths, batch_size, accelerator.process_index, accelerator.num_processes)
    with nullcontext() if adapter else inner.disable_adapter():
        for chosen in batches:
            rows = [examples[i] for i in chosen]
            batch = collate.pad(rows, pad_token_id) if rows else collate.nothing(pad_token_id)
            loss, count = training_model(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()})
            total += torch.stack([loss.double(), count.double()])
    total = accelerator.reduce(total, reduction="sum")
    training_model.train(was_training)
    return (total[0] / total[1]).item(), int(total[1].item())
