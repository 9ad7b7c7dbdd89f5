"""Held-out loss: each process computes its share of the rows."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate import Accelerator

from open_instruct.data.dataset import Examples
from open_instruct.data.packing import Batching, to_device
from open_instruct.model.evaluation_mode import evaluating


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    training_model: torch.nn.Module,
    examples: Examples,
    batching: Batching,
    adapter: bool = True,
) -> tuple[float, int]:
    """Return the mean loss over the labelled tokens of all examples, in nats, and the number of those tokens.

    Args:
        accelerator: sums over processes.
        training_model: a `TrainingModel`, as the engine prepared it.
        examples: held-out examples; the same on every process.
        batching: makes micro-batches.
        adapter: False switches the adapter off: the base model's loss.
    """
    unwrapped = accelerator.unwrap_model(training_model)
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    batches = batching.micro_batches(range(len(examples)), examples.lengths, rank, num_ranks)
    with evaluating(training_model), nullcontext() if adapter else unwrapped.without_adapter():
        for indices in batches:
            batch = to_device(batching.collate([examples[i] for i in indices]), accelerator.device)
            loss, num_tokens = training_model(**batch)
            total += torch.stack([loss.double(), num_tokens.double()])
    total = accelerator.reduce(total, reduction="sum")
    return (total[0] / total[1]).item(), int(total[1].item())
