"""The training loop: explicit, short, the same for every method."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType

from open_instruct.data.collate import Batching, to_device
from open_instruct.data.dataset import Examples
from open_instruct.data.plan import Plan
from open_instruct.errors import InputError
from open_instruct.training import engines
from open_instruct.training.checkpoint import Progress
from open_instruct.training.faults import Preempted, StopRequest, is_out_of_memory, out_of_memory
from open_instruct.training.tracking import Metrics


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
    max_skipped_steps: int = 3  # in a row
    halved: bool = False  # memory ran out once


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
    observe: Callable[[float, float], None],
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
        observe: takes loss and gradient norm of each step that was applied.
        evaluate: measures and records the held-out loss.
        save: writes a checkpoint.

    Raises:
        InputError: loss or gradient stays infinite or NaN; parameters are those of the last finite step.
        Preempted: a signal asked for it; a checkpoint is written.
    """
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    window_seconds, window_tokens, skipped = 0.0, 0, 0
    with StopRequest() as stop:
        for step in range(progress.step, plan.num_steps):
            started = time.perf_counter()
            indices = plan.examples(step)
            label_tokens = int(examples.label_counts[indices].sum())
            loss_sum, settings = gradient_within_memory(
                accelerator, model, optimizer, examples, step, indices, settings, metrics
            )
            # One exchange for two facts: a signal may have reached only some of the processes.
            totals = accelerator.reduce(
                torch.stack([loss_sum, loss_sum.new_tensor(float(stop.name is not None))]), reduction="sum"
            )
            learning_rate, loss = schedule.get_last_lr()[0], totals[0].item() / label_tokens
            bound = settings.clip_grad_norm if settings.clip_grad_norm > 0 else math.inf
            grad_norm = float(engines.whole_tensor(accelerator.clip_grad_norm_(parameters, bound)))
            if math.isfinite(loss) and math.isfinite(grad_norm):
                optimizer.step()
                skipped = 0
            else:
                skipped += 1
                reason = f"loss {loss}, gradient norm {grad_norm} at learning rate {learning_rate:.3g}"
                metrics.write({"step": step + 1, "skipped": reason, "example_indices": indices.tolist()})
                metrics.say(
                    f"step {step + 1}/{plan.num_steps} | not applied: {reason}; its examples are in metrics.jsonl"
                )
                if skipped >= settings.max_skipped_steps or accelerator.distributed_type == DistributedType.DEEPSPEED:
                    raise InputError(
                        f"step {step + 1}: {reason}, {skipped} in a row: lower --learning_rate or set --clip_grad_norm"
                    )
            schedule.step()
            optimizer.zero_grad()

            tokens = int(examples.lengths[indices].sum())
            seconds = time.perf_counter() - started
            progress.advance(len(indices), tokens, label_tokens, seconds)
            window_seconds, window_tokens = window_seconds + seconds, window_tokens + tokens
            metrics.progress.update(1)
            if not skipped:
                observe(loss, grad_norm)
            logged = progress.step % settings.logging_steps == 0 or progress.step == plan.num_steps
            if logged and not skipped:
                metrics.step_row(
                    progress, plan.epoch(progress.step), loss, learning_rate, grad_norm, window_tokens / window_seconds
                )
                window_seconds, window_tokens = 0.0, 0
            if (settings.eval_steps and progress.step % settings.eval_steps == 0) or progress.step == plan.num_steps:
                evaluate()
            due = settings.checkpoint_every and progress.step % settings.checkpoint_every == 0
            preempted = totals[1].item() > 0 and progress.step < plan.num_steps
            if due or preempted:
                save()
            if preempted:
                raise Preempted(f"stopped by {stop.name or 'a signal to another process'} after step {progress.step}")


def gradient_within_memory(
    accelerator: Any,
    model: torch.nn.Module,
    optimizer: Any,
    examples: Examples,
    step: int,
    indices: Any,
    settings: FitSettings,
    metrics: Metrics,
) -> tuple[torch.Tensor, FitSettings]:
    """`step_gradient`; where memory runs out in a packed row, once more with rows of half the length, which are kept.

    Returns:
        This process's summed token loss, and the settings to go on with.

    Raises:
        InputError: memory runs out and rows can't be halved, or several processes run, of which the others wait.
    """
    try:
        return step_gradient(accelerator, model, examples, step, indices, settings), settings
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    halved = settings.batching.halved(indices.tolist(), examples.lengths)
    if halved is None or settings.halved or accelerator.num_processes > 1:
        raise out_of_memory(accelerator, step)
    optimizer.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    metrics.say(
        f"step {step + 1} | out of memory: going on with rows of {halved.max_tokens:,} tokens (--max_tokens_per_microbatch)"
    )
    settings = replace(settings, batching=halved, halved=True)
    return gradient_within_memory(accelerator, model, optimizer, examples, step, indices, settings, metrics)


def step_gradient(
    accelerator: Any, model: torch.nn.Module, examples: Examples, step: int, indices: Any, settings: FitSettings
) -> torch.Tensor:
    """Accumulate the gradient of a step and return this process's summed token loss.

    With S the step's examples on all R processes, the gradient is d/dθ of  Σ_{tokens of S} loss / label_tokens.
    Each process sums its own micro-batches. DDP averages over processes, so each sum is multiplied by R.
    """
    # Dropout is a function of seed, step and process: a resumed run draws what the uninterrupted one draws.
    torch.manual_seed(
        int(np.random.SeedSequence([settings.seed, step, accelerator.process_index]).generate_state(1)[0])
    )
    label_tokens = int(examples.label_counts[indices].sum())
    batches = settings.batching.micro_batches(
        indices.tolist(), examples.lengths, accelerator.process_index, accelerator.num_processes
    )
    divisor = label_tokens
    if settings.sum_loss:
        divisor = settings.accumulation_steps * accelerator.num_processes
    total = torch.zeros((), device=accelerator.device)
    for number, chosen in enumerate(batches, start=1):
        batch = to_device(settings.batching.collate([examples[i] for i in chosen]), accelerator.device)
        accelerator.sync_gradients = number == len(
            batches
        )  # DeepSpeed steps inside the backward pass where this is set
        exchange = accelerator.sync_gradients or settings.sync_each_batch
        with nullcontext() if exchange else accelerator.no_sync(model):
            loss, _ = model(**batch)
            accelerator.backward(loss * (accelerator.num_processes / divisor))
        total += loss.detach()
    return total
