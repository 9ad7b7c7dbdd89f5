"""Held-out loss, of all rows and of each source: each process computes its share of the rows."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from open_instruct.data.dataset import Examples
from open_instruct.data.packing import Batching, to_device
from open_instruct.data.sources import MAX_MEASURED
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.training.state import TrainState


class HeldOutLoss(NamedTuple):
    """Mean losses over labelled tokens, in nats."""

    loss: float
    num_tokens: int  # labelled tokens of all rows
    by_source: dict[str, float]  # of each source; empty where there is one, or more than MAX_MEASURED


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    training_model: torch.nn.Module,
    examples: Examples,
    batching: Batching,
    adapter: bool = True,
) -> HeldOutLoss:
    """Return the mean loss over the labelled tokens of all examples, and of those of each source.

    A micro-batch holds examples of one source, because the model returns the sum of its losses.

    Args:
        accelerator: sums over processes.
        training_model: a `TrainingModel`, as the engine prepared it.
        examples: held-out examples; the same on every process.
        batching: makes micro-batches.
        adapter: False switches the adapter off: the base model's loss.
    """
    unwrapped = accelerator.unwrap_model(training_model)
    sources = measured_sources(examples)
    groups = list(sources.values()) or [np.arange(len(examples))]
    totals = torch.zeros(len(groups), 2, dtype=torch.float64, device=accelerator.device)
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    with evaluating(training_model), nullcontext() if adapter else unwrapped.without_adapter():
        for total, group in zip(totals, groups, strict=True):
            for indices in batching.micro_batches(group.tolist(), examples.lengths, rank, num_ranks):
                batch = to_device(batching.collate([examples[i] for i in indices]), accelerator.device)
                loss, num_tokens = training_model(**batch)
                total += torch.stack([loss.double(), num_tokens.double()])
    totals = accelerator.reduce(totals, reduction="sum")
    loss, num_tokens = totals.sum(0).tolist()
    means = (totals[:, 0] / totals[:, 1]).tolist()
    return HeldOutLoss(loss / num_tokens, int(num_tokens), dict(zip(sources, means, strict=False)))


def measured_sources(examples: Examples) -> dict[str, np.ndarray]:
    """Return the indices of each source's examples; empty where there is one source, or more than MAX_MEASURED."""
    return examples.sources if 1 < len(examples.sources) <= MAX_MEASURED else {}


def source_summary(state: TrainState, held_out: Examples | None) -> dict[str, dict[str, Any]]:
    """Return the losses of each source for summary.json; the final one is that of the saved parameters."""
    if held_out is None:
        return {}
    at_step, base = dict(state.history.by_source), state.history.base_by_source
    saved = at_step.get(state.saved_step, {})
    return {
        name: {
            "held_out_rows": len(rows),
            "eval_tokens": int(held_out.label_counts[rows].sum()),
            "base_eval_loss": base.get(name),
            "initial_eval_loss": at_step.get(0, {}).get(name),
            "final_eval_loss": saved.get(name),
        }
        for name, rows in measured_sources(held_out).items()
    }
