"""Resumable state on disk: every trained parameter, the optimizer, the schedule, and the run's `TrainState`.

PEFT's own save keeps only what inference needs: P-tuning's network and a prefix's projection would be lost. Random
numbers and the order of examples are functions of seed and step, so they need no state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from open_instruct.errors import InputError, one_line, warn
from open_instruct.files import flush, sha256, write_json
from open_instruct.training import sharding
from open_instruct.training.state import History, TrainState

COMPLETED = "COMPLETED"  # marks a finished checkpoint, and holds the checksums of its files
TRAINED, BEST, STATE, OPTIMIZER = "trained.safetensors", "best.safetensors", "state.json", "optimizer.pt"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch and safetensors report it


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint whose state has been read."""

    path: Path
    state: TrainState  # without its best parameters
    schedule: dict[str, Any]


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    schedule: Any,
    state: TrainState,
    keep: int,
    accelerator: Accelerator,
) -> str | None:
    """Write `folder`/step_N under a temporary name, flush it to disk, rename it, mark it; then drop the oldest.

    Every process calls this. The main one writes, whichever process holds the tensors; under ZeRO each one adds its
    part of the optimizer to the same folder, which all nodes must share.

    Args:
        folder: folder of the run's checkpoints.
        model: model with the trained parameters, sharded or not.
        optimizer: optimizer as the engine prepared it.
        schedule: schedule of the learning rate.
        state: counters, losses and best parameters to save.
        keep: number of checkpoints to keep, -1: all.
        accelerator: joins the run's processes.

    Returns:
        None, or why the checkpoint could not be written. In that case older ones are untouched.
    """
    working = folder / f".step_{state.step}.writing"
    rank, part = accelerator.process_index, sharding.part_name(accelerator)
    zero = sharding.zero_optimizer(optimizer)
    tensors = sharding.gather_full(sharding.trained_parameters(model), accelerator)
    optimizer_state = sharding.optimizer_state(optimizer) if zero is None else None
    problem = None
    try:
        if rank == 0:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
            save_file(tensors, working / TRAINED)
            if state.best:
                save_file(state.best, working / BEST)
            content = {"progress": state_values(state), "schedule": schedule.state_dict()}
            (working / STATE).write_text(json.dumps(content, default=str))
            if optimizer_state is not None:
                torch.save(optimizer_state, working / OPTIMIZER)
    except WRITE_ERRORS as error:
        problem = one_line(error)
    accelerator.wait_for_everyone()
    if part is not None:
        zero_part = sharding.zero_state(zero)
        try:
            torch.save(zero_part, working / part)
        except WRITE_ERRORS as error:
            problem = problem or one_line(error)
    failed = torch.tensor(float(problem is not None), device=accelerator.device)
    num_failed = accelerator.reduce(failed, reduction="sum").item()
    if rank == 0 and not num_failed:
        try:
            _finish(working, folder / f"step_{state.step}")
            for old in complete_checkpoints(folder)[: -max(keep, 1)] if keep >= 0 else []:
                shutil.rmtree(old)
        except WRITE_ERRORS as error:
            problem = one_line(error)
    if rank == 0:
        shutil.rmtree(working, ignore_errors=True)
    accelerator.wait_for_everyone()
    return problem or ("another process could not write" if num_failed else None)


def state_values(state: TrainState) -> dict[str, Any]:
    """Return a state's fields as JSON values, without the best parameters."""
    values = {item.name: getattr(state, item.name) for item in fields(state) if item.name != "best"}
    return {**values, "history": asdict(state.history)}


def _finish(working: Path, final: Path) -> None:
    """Flush a filled folder to disk, give it its final name, and mark it with the checksums of its files."""
    for path in working.iterdir():
        flush(path)
    sums = {path.name: sha256(path) for path in sorted(working.iterdir())}
    shutil.rmtree(final, ignore_errors=True)
    os.replace(working, final)
    write_json(final / COMPLETED, sums)
    flush(final.parent)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, oldest first. `damage` says whether their files are still intact."""
    finished = [
        path
        for path in folder.glob("step_*")
        if path.name.removeprefix("step_").isdecimal() and (path / COMPLETED).exists()
    ]
    return sorted(finished, key=lambda path: int(path.name.removeprefix("step_")))


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, judged by their checksums; None if it is intact."""
    try:
        sums = json.loads((path / COMPLETED).read_text())
    except (OSError, ValueError):
        return "it was never finished"
    if not isinstance(sums, dict):
        return f"its file {COMPLETED} is damaged"
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != expected:
            return f"{name} does not match its checksum"
    return None


def find(requested: str, output_dir: Path) -> Checkpoint | None:
    """Return the checkpoint to resume from: that of a path, or the newest intact one (None where there is none yet).

    Args:
        requested: a path, or "newest".
        output_dir: folder of the run.

    Raises:
        InputError: the path is no complete checkpoint, or its state can't be read.
    """
    folder = output_dir / "checkpoints"
    if requested == "newest":
        for path in reversed(complete_checkpoints(folder)):
            reason = damage(path)
            if reason is None:
                return read_checkpoint(path)
            warn(f"checkpoint {path} is damaged ({reason}): using the one before it")
        if complete_checkpoints(folder):
            raise InputError(
                f"all checkpoints in {folder} are damaged: drop --resume_from_checkpoint and start anew with "
                "--overwrite_output_dir"
            )
        return None
    path = Path(requested)
    reason = damage(path) if path.is_dir() else "it does not exist"
    if reason:
        known = ", ".join(p.name for p in complete_checkpoints(folder) if damage(p) is None) or "none"
        raise InputError(f"checkpoint {path} can't be used ({reason}): intact ones in {folder}: {known}")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state of a checkpoint.

    Raises:
        InputError: it can't be read.
    """
    try:
        content = json.loads((path / STATE).read_text())
        values = dict(content["progress"])
        history = History(**values.pop("history", history_of_old(values)))
        history.evaluations = [(step, loss) for step, loss in history.evaluations]
        return Checkpoint(path, TrainState(**values, history=history), content["schedule"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} can't be read ({error}): resume from an earlier one") from None


def history_of_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the counters of a checkpoint without a history say of it: versions before 0.1 wrote none."""
    losses = {"base": values.get("base_eval_loss"), "initial": values.get("initial_eval_loss")}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return {**known, "reported": [finding["name"] for finding in values.get("findings", [])]}


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Any,
    schedule: Any,
    accelerator: Accelerator,
) -> TrainState:
    """Restore everything as it was when the checkpoint was written: the one way to resume.

    Args:
        checkpoint: the checkpoint to resume from.
        model: model with the adapter, as the engine prepared it.
        optimizer: optimizer as the engine prepared it.
        schedule: schedule of the learning rate.
        accelerator: joins the run's processes.

    Returns:
        The run's state, with the best parameters on the main process.

    Raises:
        InputError: the files are damaged, or belong to another run or engine.
    """
    path, state = checkpoint.path, checkpoint.state
    part = sharding.part_name(accelerator)
    if not (path / (part or OPTIMIZER)).exists():
        written = ", ".join(sorted(file.name for file in path.glob("optimizer*")))
        raise InputError(
            f"checkpoint {path} was written by another engine or, under ZeRO, another number of processes (it holds "
            f"{written}): resume with the same engine and number; only a single process, DDP and FSDP can continue "
            "each other's checkpoints"
        )
    parameters = sharding.trained_parameters(model)
    try:
        values = load_file(path / TRAINED)
        optimizer_state = torch.load(path / (part or OPTIMIZER), weights_only=True, map_location="cpu")
        state.best = load_file(path / BEST) if state.best_step is not None and accelerator.is_main_process else {}
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} is damaged ({one_line(error)}): resume from an earlier one") from None
    shapes = {name: sharding.full_shape(parameter) for name, parameter in parameters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in values.items()}:
        raise InputError(
            f"checkpoint {path} holds other parameters than those that this run trains: give the same method and sizes"
        )
    sharding.load_full(parameters, values)
    if part is None:
        sharding.load_optimizer_state(optimizer, optimizer_state)
    else:
        sharding.load_zero_state(sharding.zero_optimizer(optimizer), optimizer_state)
    schedule.load_state_dict(checkpoint.schedule)
    accelerator.print(f"resuming after step {state.step} from {path}")
    return state
