"""The training loop: explicit, the same for every method and engine."""

from __future__ import annotations

import gc
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator, DistributedType

from open_instruct.data.packing import Batching, to_device
from open_instruct.data.plan import Plan
from open_instruct.errors import InputError, warn
from open_instruct.methods import Method
from open_instruct.model.weights import not_finite, some_of
from open_instruct.report.summary import sources_text
from open_instruct.training import checkpoint, engines, sharding
from open_instruct.training.doctor import Doctor, Finding
from open_instruct.training.ending import end_text, has_ended
from open_instruct.training.evaluation import HeldOutLoss, held_out_loss
from open_instruct.training.faults import is_out_of_memory, out_of_memory
from open_instruct.training.forward import Forward
from open_instruct.training.load_data import Data
from open_instruct.training.preemption import Preempted, RunGuard
from open_instruct.training.run_folder import CHECKPOINTS, RunFolder
from open_instruct.training.state import TrainState, median_norm
from open_instruct.training.tracking import OF_SOURCE, Metrics


@dataclass(frozen=True)
class LoopSettings:
    """Plain values of the loop."""

    accumulation_steps: int
    clip_grad_norm: float  # bound of the L2 norm; none where not positive
    seed: int
    logging_steps: int
    eval_steps: int  # 0: none between start and end
    checkpoint_every: int  # steps; 0: none
    keep_checkpoints: int  # -1: all
    keep_best: bool
    patience: int | None = None  # evaluations in a row without a lower loss that end the run; None: all steps are made
    sum_loss: bool = False
    sync_each_batch: bool = False
    in_float16: bool = False  # the base computes in float16, so that small gradients would become 0
    max_skipped_steps: int = 3  # in a row


@dataclass(frozen=True)
class TrainingJob:
    """Everything that the loop works with."""

    accelerator: Accelerator
    model: torch.nn.Module  # a `TrainingModel`, as the engine prepared it
    optimizer: Any  # as the engine prepared it
    schedule: Any  # not prepared: it advances once a step, whatever the number of processes
    method: Method
    forward: Forward
    data: Data  # the same on every process
    plan: Plan
    settings: LoopSettings
    metrics: Metrics
    doctor: Doctor
    folder: RunFolder
    guard: RunGuard


def fit(job: TrainingJob, state: TrainState) -> None:
    """Measure the base and the start, then train from `state.step` to the run's end. Updates `state`.

    The end is the plan's, or an earlier one (--patience).

    Raises:
        InputError: loss or gradient stays infinite or NaN (the parameters are those of the last finite step), or memory
            runs out.
        Preempted: a signal requested it; a checkpoint is written.
    """
    accelerator, optimizer, plan, settings, metrics = (
        job.accelerator,
        job.optimizer,
        job.plan,
        job.settings,
        job.metrics,
    )
    examples, batching = job.data.train, job.forward.training
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    window_seconds, window_tokens, num_skipped = 0.0, 0, 0
    started, seconds_before = time.perf_counter(), state.wall_seconds
    if state.step == 0:
        measure_start(job, state)
    job.model.train()
    job.guard.remember()  # from here on there is something to save
    # Asked before the first step, too: the checkpoint may be that of the step that ended the run.
    while not has_ended(state, plan.num_steps, settings.patience):
        step = state.step
        step_started = time.perf_counter()
        indices = plan.examples(step)
        label_tokens = int(examples.label_counts[indices].sum())
        loss_sum = None
        while loss_sum is None:
            try:
                loss_sum = step_gradient(job, batching, step, indices)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # Tried once; the rows stay half as long. With several processes the others would wait forever.
                halved = batching.halved(indices.tolist(), examples.lengths)
                if halved is None or batching is not job.forward.training or accelerator.num_processes > 1:
                    raise out_of_memory(accelerator, step) from None
            if loss_sum is None:  # outside of the handler, whose traceback keeps the failed step's tensors alive
                batching = free_memory(job, step, halved)
        # One reduction for loss and stop request: a signal may have reached only some of the processes.
        stop_requested = loss_sum.new_tensor(float(job.guard.signal is not None))
        totals = accelerator.reduce(torch.stack([loss_sum, stop_requested]), reduction="sum")
        learning_rate, loss = job.schedule.get_last_lr()[0], totals[0].item() / label_tokens
        bound = settings.clip_grad_norm if settings.clip_grad_norm > 0 else math.inf
        grad_norm = float(sharding.full_tensor(accelerator.clip_grad_norm_(parameters, bound)))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            optimizer.step()
            num_skipped = 0
        else:
            num_skipped += 1
            report_skipped(job, step, indices, loss, grad_norm, learning_rate, num_skipped)
        job.schedule.step()
        optimizer.zero_grad()

        tokens = int(examples.lengths[indices].sum())
        seconds = time.perf_counter() - step_started
        state.advance(len(indices), tokens, label_tokens, seconds)
        window_seconds, window_tokens = window_seconds + seconds, window_tokens + tokens
        metrics.bar.update(1)
        is_last = state.step == plan.num_steps
        if not num_skipped:
            report(job, state, job.doctor.step(loss, grad_norm))
            if state.step % settings.logging_steps == 0 or is_last:
                speed, epoch = window_tokens / window_seconds, plan.epoch(state.step)
                metrics.step_row(state, epoch, loss, learning_rate, grad_norm, speed)
                window_seconds, window_tokens = 0.0, 0
        if (settings.eval_steps and state.step % settings.eval_steps == 0) or is_last:
            evaluate_held_out(job, state)
            is_last = has_ended(state, plan.num_steps, settings.patience)
        state.wall_seconds = seconds_before + time.perf_counter() - started
        is_due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0
        is_preempted = totals[1].item() > 0 and not is_last
        if is_due or is_preempted:
            check_trained_finite(job, state)
            save_checkpoint(job, state)
        if is_preempted:
            raise Preempted(stopped_text(job, f"after step {state.step}"))
    state.wall_seconds = seconds_before + time.perf_counter() - started
    if state.step < plan.num_steps:
        metrics.print(f"ended by {end_text(state, plan.num_steps)}")
    if not state.best_is_earlier:
        check_trained_finite(job, state)


def step_gradient(job: TrainingJob, batching: Batching, step: int, indices: np.ndarray) -> torch.Tensor:
    """Accumulate the gradient of a step and return this process's summed token loss.

    With S the step's examples on all R processes, the gradient is d/dθ of  Σ_{tokens of S} loss / label_tokens.
    Each process sums its own micro-batches. DDP averages over processes, so each sum is multiplied by R.
    """
    accelerator, settings, examples = job.accelerator, job.settings, job.data.train
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    # Dropout is a function of seed, step and process: a resumed run draws what the uninterrupted one draws.
    torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, rank]).generate_state(1)[0]))
    batches = batching.micro_batches(indices.tolist(), examples.lengths, rank, num_ranks)
    divisor = int(examples.label_counts[indices].sum())
    if settings.sum_loss:
        divisor = settings.accumulation_steps * num_ranks
    scale = 1.0
    if settings.in_float16 and accelerator.distributed_type != DistributedType.DEEPSPEED:  # it keeps the gradients
        scale = loss_scale(divisor / num_ranks)
    total = torch.zeros((), device=accelerator.device)
    for number, row in enumerate(batches, start=1):
        batch = to_device(batching.collate([examples[i] for i in row]), accelerator.device)
        accelerator.sync_gradients = number == len(batches)  # DeepSpeed steps inside the backward pass where it is set
        syncs = accelerator.sync_gradients or settings.sync_each_batch
        with nullcontext() if syncs else accelerator.no_sync(job.model):
            loss, _ = job.model(**batch)
            accelerator.backward(loss * (scale * num_ranks / divisor))
        total += loss.detach()
    if scale != 1:
        for group in job.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)
    return total


def loss_scale(divisor: float) -> float:
    """Return the power of two by which a loss that is divided by `divisor` is multiplied for a float16 backward pass.

    A token's share of the mean over 200,000 tokens is too small for float16: measured on small models, 35 % of the
    entries of a prefix' gradient became 0. So a token keeps about 1/64 of its loss on the way back. The gradient, which
    is float32, is divided by the scale, which is exact for a power of two. 1/64 leaves room for the sums over tokens
    that the gradient of a shared prefix consists of; if they overflow all the same, the step is not applied.
    """
    return 2.0 ** max(0, math.floor(math.log2(divisor / 64)))


def measure_start(job: TrainingJob, state: TrainState) -> None:
    """Measure the base model and the start on the held-out rows."""
    report(job, state, job.doctor.before())
    held_out = job.data.held_out
    if held_out and not job.method.trains_base:  # in full fine-tuning the start is the base
        of_base = loss_in_memory(job, state, adapter=False)
        state.base_eval_loss, state.history.base_by_source = of_base.loss, of_base.by_source
    evaluate_held_out(job, state)


def evaluate_held_out(job: TrainingJob, state: TrainState) -> None:
    """Measure the held-out loss, keep the parameters if it is the lowest, and report the doctor's findings."""
    if not job.data.held_out:
        return
    measured = loss_in_memory(job, state)
    loss = measured.loss
    state.record_eval(loss, measured.by_source)
    if job.settings.keep_best:
        state.keep_if_best(loss, job.forward.model.model, job.accelerator)
    by_source = {f"{OF_SOURCE}{name}": value for name, value in measured.by_source.items()}
    job.metrics.write({"step": state.step, "eval_loss": loss, "eval_tokens": measured.num_tokens, **by_source})
    line = f"step {state.step}/{job.plan.num_steps} | held-out loss {loss:.4f} (base model {state.base_eval_loss:.4f})"
    job.metrics.print(line + sources_text(measured.by_source, state.history.base_by_source))
    if state.step:
        report(job, state, job.doctor.evaluation(state.step, loss, prompt_norm(job)))
    else:
        report(job, state, job.doctor.first(state.base_eval_loss or loss, loss))


def loss_in_memory(job: TrainingJob, state: TrainState, adapter: bool = True) -> HeldOutLoss:
    """Return `held_out_loss`, by shorter rows if memory runs out.

    Raises:
        InputError: memory runs out, and rows can't be shorter.
    """
    held_out, batching = job.data.held_out, job.forward.evaluation
    assert held_out is not None
    while True:
        try:
            return held_out_loss(job.accelerator, job.model, held_out, batching, adapter)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            halved = batching.halved(list(range(len(held_out))), held_out.lengths)
            if halved is None or job.accelerator.num_processes > 1:
                raise out_of_memory(job.accelerator, state.step) from None
        batching = free_memory(job, state.step, halved)


def prompt_norm(job: TrainingJob) -> float:
    """Return the median length of a virtual token; nan where there are no embeddings, or only a part of the model."""
    if engines.is_sharded(engines.engine_of(job.accelerator)):
        return math.nan
    return median_norm(job.method.prompt_vectors(job.forward.model.model))


def report(job: TrainingJob, state: TrainState, findings: list[Finding]) -> None:
    """Print the doctor's findings, and keep them in the state."""
    for finding in findings:
        state.findings.append({"step": state.step, **asdict(finding)})
        job.metrics.print(str(finding))


def report_skipped(
    job: TrainingJob,
    step: int,
    indices: np.ndarray,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    num_skipped: int,
) -> None:
    """Report a step that was not applied, and its examples.

    Raises:
        InputError: too many in a row.
    """
    reason = f"loss {loss}, gradient norm {grad_norm} at learning rate {learning_rate:.3g}"
    job.metrics.write({"step": step + 1, "skipped": reason, "example_indices": indices.tolist()})
    job.metrics.print(
        f"step {step + 1}/{job.plan.num_steps} | not applied: {reason}; its examples are in metrics.jsonl"
    )
    is_deepspeed = job.accelerator.distributed_type == DistributedType.DEEPSPEED
    most = min(job.settings.max_skipped_steps, job.plan.num_steps)  # a run of which no step was applied has no result
    if num_skipped >= most or is_deepspeed:
        raise InputError(
            f"step {step + 1}: {reason}, {num_skipped} in a row: lower --learning_rate, or set --clip_grad_norm"
        )


def free_memory(job: TrainingJob, step: int, batching: Any) -> Batching:
    """Drop a half-computed gradient, report the shorter rows, and return their batching."""
    job.optimizer.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    job.metrics.print(
        f"step {step + 1} | out of memory: continuing with rows of {batching.max_tokens:,} tokens "
        "(--max_tokens_per_microbatch)"
    )
    return batching


def check_trained_finite(job: TrainingJob, state: TrainState) -> None:
    """Refuse to save trained parameters that are not finite. Every process calls this, and learns of the others'.

    Raises:
        InputError: naming three of them.
    """
    parts = (
        (name, sharding.local_part(parameter)) for name, parameter in sharding.trained_parameters(job.model).items()
    )
    names = not_finite(parts)
    found = torch.tensor(float(len(names)), device=job.accelerator.device)
    if job.accelerator.reduce(found, reduction="sum").item():
        where = some_of(names) or "on another process"
        raise InputError(
            f"step {state.step}: trained parameters are not finite ({where}), and are not saved: lower --learning_rate"
        )


def stopped_text(job: TrainingJob, moment: str) -> str:
    """Return the line of a run that a signal stopped."""
    by = job.guard.signal or "a signal to another process"
    return f"stopped by {by} {moment}: continue with --resume_from_checkpoint"


def save_checkpoint(job: TrainingJob, state: TrainState, alone: bool = False) -> None:
    """Write a checkpoint. If that fails, warn and continue: the last good one is still there."""
    keep, model = job.settings.keep_checkpoints, job.forward.model.model
    problem = checkpoint.save(job.folder, model, job.optimizer, state, keep, job.accelerator, alone)
    if problem and job.accelerator.is_main_process:
        warn(f"checkpoint of step {state.step} could not be written ({problem})")


def stop_at_end(job: TrainingJob, state: TrainState) -> NoReturn:
    """Write a checkpoint of the last step on the main process, if there is none, so that the end can be done again.

    Raises:
        Preempted: always.
    """
    if checkpoint.damage(job.folder.path / CHECKPOINTS / f"step_{state.step}"):
        save_checkpoint(job, state, alone=True)
    raise Preempted(stopped_text(job, f"after the last step, {state.step}")) from None
