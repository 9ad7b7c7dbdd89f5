"""The training loop: explicit, short, the same for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from open_instruct.data.collate import Batching, to_device
from open_instruct.data.dataset import Examples
from open_instruct.data.plan import Plan
from open_instruct.errors import InputError
from open_instruct.training.checkpoint import Progress
from open_instruct.training.tracking import Metrics, peak_memory_mb


@dataclass(frozen=True)
class FitSettings:
    """Plain values of the loop."""

    batching: Batching
    accumulation_steps: int
    clip_grad_norm: float  # bound of the L2 norm; none where not positive
    seed: int
    logging_steps: int
    eval_steps: int  # 0: none between start and end
    checkpoint_every: int  # steps; 0: none
    sum_loss: bool = False
    sync_each_batch: bool = False


def fit(
    accelerator: Any,
    model: torch.nn.Module,
    optimizer: Any,
    schedule: Any,
    examples: Examples,
    plan: Plan,
    settings: FitSettings,
    progress: Progress,
    metrics: Metrics,
    evaluate: Callable[[], None],
    save: Callable[[], None],
) -> None:
    """Train from `progress.step` to `plan.num_steps`.

    Args:
        accelerator: accelerate's, for devices and processes.
        model: a prepared `TrainingModel`.
        optimizer: prepared.
        schedule: learning-rate schedule, not prepared: it advances once a step whatever the number of processes.
        examples: training examples; the same on every process.
        plan: which examples each step holds.
        settings: plain values.
        progress: updated in place.
        metrics: takes a row each logged step.
        evaluate: measures and records the held-out loss.
        save: writes a checkpoint.

    Raises:
        InputError: loss or gradient is no longer finite; parameters are those of the step before.
    """
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    window_seconds, window_tokens = 0.0, 0
    for step in range(progress.step, plan.num_steps):
        started = time.perf_counter()
        # Dropout is a function of seed, step and process: a resumed run draws what the uninterrupted one draws.
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, accelerator.process_index]).generate_state(1)[0]))
        indices = plan.examples(step)
        label_tokens = int(examples.label_counts[indices].sum())
        loss_sum = step_gradient(accelerator, model, examples, indices, label_tokens, settings)
        learning_rate = schedule.get_last_lr()[0]
        loss = accelerator.reduce(loss_sum, reduction="sum").item() / label_tokens
        bound = settings.clip_grad_norm if settings.clip_grad_norm > 0 else math.inf
        grad_norm = float(accelerator.clip_grad_norm_(parameters, bound))
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise InputError(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm} at learning rate {learning_rate:.3g}; the step was not "
                "applied: lower --learning_rate or set --clip_grad_norm"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        tokens = int(examples.lengths[indices].sum())
        seconds = time.perf_counter() - started
        progress.advance(len(indices), tokens, label_tokens, seconds)
        window_seconds, window_tokens = window_seconds + seconds, window_tokens + tokens
        metrics.progress.update(1)
        if progress.step % settings.logging_steps == 0 or progress.step == plan.num_steps:
            row = {
                "step": progress.step,
                "epoch": plan.epoch(progress.step),
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "examples": progress.examples,
                "tokens": progress.tokens,
                "label_tokens": progress.label_tokens,
                "tokens_per_second": round(window_tokens / window_seconds, 1),
                "peak_memory_mb": peak_memory_mb(),
            }
            window_seconds, window_tokens = 0.0, 0
            metrics.write(row)
            metrics.step_line(row)
        if (settings.eval_steps and progress.step % settings.eval_steps == 0) or progress.step == plan.num_steps:
            evaluate()
        if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
            save()


def step_gradient(
    accelerator: Any, model: torch.nn.Module, examples: Examples, indices: Any, label_tokens: int, settings: FitSettings
) -> torch.Tensor:
    """Accumulate the gradient of a step and return this process's summed token loss.

    With S the step's examples on all R processes, the gradient is d/dθ of  Σ_{tokens of S} loss / label_tokens.
    Each process sums its own micro-batches. DDP averages over processes, so each sum is multiplied by R.
    """
    batches = settings.batching.cut(indices.tolist(), examples.lengths, accelerator.process_index, accelerator.num_processes)
    divisor = label_tokens
    if settings.sum_loss:
        divisor = settings.accumulation_steps * accelerator.num_processes
    total = torch.zeros((), device=accelerator.device)
    for number, chosen in enumerate(batches, start=1):
        batch = to_device(settings.batching.tensors([examples[i] for i in chosen]), accelerator.device)
        accelerator.sync_gradients = number == len(batches)  # DeepSpeed steps inside the backward pass where this is set
        exchange = accelerator.sync_gradients or settings.sync_each_batch
        with nullcontext() if exchange else accelerator.no_sync(model):
            loss, _ = model(**batch)
            accelerator.backward(loss * (accelerator.num_processes / divisor))
        total += loss.detach()
    return total
