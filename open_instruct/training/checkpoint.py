"""Resumable state on disk: every trained parameter, the optimizer's moments, and the run's `TrainState`.

PEFT's own save keeps only what inference needs: P-tuning's network and a prefix's projection would be lost. Random
numbers, the order of examples and the learning rate are functions of seed and step, so they need no state.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from open_instruct.errors import InputError, input_faults, one_line, reason_of, warn
from open_instruct.files import flush, sha256, write_json
from open_instruct.methods import Feature
from open_instruct.temporary import share
from open_instruct.training import sharding, stored
from open_instruct.training.engines import engine_of
from open_instruct.training.optimizer import first_state, set_step
from open_instruct.training.run_folder import CHECKPOINTS, RunFolder, step_number
from open_instruct.training.state import TrainState

COMPLETED = "COMPLETED"  # marks a finished checkpoint, and holds the checksums of its files
TRAINED, BEST, STATE, OPTIMIZER = "trained.safetensors", "best.safetensors", "state.json", "optimizer.pt"
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch and safetensors report it


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint whose state has been read."""

    path: Path
    state: TrainState  # without its best parameters


def save(
    own: RunFolder,
    model: nn.Module,
    optimizer: Any,
    state: TrainState,
    keep: int,
    accelerator: Accelerator,
    alone: bool = False,
) -> str | None:
    """Write checkpoints/step_N under a temporary name, flush it to disk, rename it, mark it; then drop the oldest.

    Every process calls this. The main one writes, whichever process holds the tensors; under ZeRO each one adds its
    part of the optimizer to the same folder, which all nodes must share.

    Args:
        own: the run's folder.
        model: model with the trained parameters, sharded or not.
        optimizer: optimizer as the engine prepared it.
        state: counters, losses and best parameters to save.
        keep: number of checkpoints to keep, -1: all.
        accelerator: joins the run's processes.
        alone: the main process calls this, and no other one: where it holds everything (`can_save_alone`).

    Returns:
        None, or why the checkpoint could not be written. In that case older ones are untouched.
    """
    name, half = f"{CHECKPOINTS}/step_{state.step}", f"{CHECKPOINTS}/.step_{state.step}.writing"
    working = own.path / half
    rank, part = accelerator.process_index, sharding.part_name(accelerator)
    zero = sharding.zero_optimizer(optimizer)
    tensors = sharding.gather_full(sharding.trained_parameters(model), accelerator)
    optimizer_state = sharding.optimizer_state(optimizer) if zero is None else None
    problem = None
    try:
        if rank == 0:
            own.remove(half)
            own.claim(half, name)
            working.mkdir(parents=True)
            save_file(tensors, working / TRAINED)
            if state.best:
                save_file(state.best, working / BEST)
            (working / STATE).write_text(json.dumps({"progress": state_values(state)}, default=str))
            if optimizer_state is not None:
                torch.save(optimizer_state, working / OPTIMIZER)
    except (*WRITE_ERRORS, InputError) as error:
        problem = one_line(error)
    if not alone:
        accelerator.wait_for_everyone()
    if part is not None:
        zero_part = sharding.zero_state(zero)
        try:
            torch.save(zero_part, working / part)
        except WRITE_ERRORS as error:
            problem = problem or one_line(error)
    failed = torch.tensor(float(problem is not None), device=accelerator.device)
    num_failed = (failed if alone else accelerator.reduce(failed, reduction="sum")).item()
    try:
        if rank == 0 and not num_failed:
            _finish(own, half, name)
            own.remove(*older(own, state.step)[: -max(keep, 1)] if keep >= 0 else [])
        if rank == 0:
            own.remove(half)
    except (*WRITE_ERRORS, InputError) as error:
        problem = problem or one_line(error)
    if not alone:
        accelerator.wait_for_everyone()
    return problem or ("another process could not write" if num_failed else None)


def state_values(state: TrainState) -> dict[str, Any]:
    """Return a state's fields as JSON values, without the best parameters."""
    values = {item.name: getattr(state, item.name) for item in fields(state) if item.name != "best"}
    return {**values, "history": asdict(state.history)}


def _finish(own: RunFolder, half: str, name: str) -> None:
    """Mark a filled folder with the checksums of its files, flush it to disk, and give it its final name."""
    working, final = own.path / half, own.path / name
    share(working)
    sums = {path.name: sha256(path) for path in sorted(working.iterdir())}
    write_json(working / COMPLETED, sums)
    for path in working.iterdir():
        flush(path)
    if final.exists():
        own.remove(name)
        own.claim(name)
    os.replace(working, final)
    flush(final.parent)


def step_of(path: Path) -> int:
    """Return the number in a checkpoint's name; -1 where another name is, as of a user's own copy."""
    number = path.name.removeprefix("step_")
    return int(number) if number.isascii() and number.isdecimal() else -1


def older(own: RunFolder, step: int) -> list[str]:
    """Return the run's own finished checkpoints up to a step, oldest first."""
    names = [f"{CHECKPOINTS}/{path.name}" for path in complete_checkpoints(own.path / CHECKPOINTS)]
    return [name for name in names if own.owns(name) and step_number(name) <= step]


def can_save_alone(accelerator: Accelerator) -> bool:
    """Return whether the main process holds all that a checkpoint needs."""
    return engine_of(accelerator) in (None, Feature.DDP)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder, oldest first. `damage` says whether they are still intact."""
    finished = [path for path in folder.glob("step_*") if step_of(path) >= 0 and (path / COMPLETED).exists()]
    return sorted(finished, key=step_of)


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint: with its checksums, or with the run's state; None if it is intact."""
    try:
        read_checkpoint(path)
    except InputError as error:
        return reason_of(error.__cause__ or error)
    return None


def find(requested: str, output_dir: Path) -> Checkpoint | None:
    """Return the checkpoint to resume from: that of a path, or the newest intact one (None where there is none yet).

    Args:
        requested: a path, or "newest".
        output_dir: folder of the run.

    Raises:
        InputError: the path is no complete checkpoint, or all are damaged.
    """
    folder = output_dir / "checkpoints"
    finished = complete_checkpoints(folder)
    if requested == "newest":
        for path in reversed(finished):
            try:
                return read_checkpoint(path)
            except InputError as error:
                warn(f"checkpoint {path} is damaged ({reason_of(error.__cause__ or error)}): using the one before it")
        if finished:
            raise InputError(
                f"all checkpoints in {folder} are damaged: drop --resume_from_checkpoint and start anew with "
                "--overwrite_output_dir"
            )
        return None
    path = Path(requested)
    with input_faults(f"checkpoint {requested}", "name another one"):
        reason = damage(path) if path.is_dir() else "it does not exist"
    if reason:
        known = ", ".join(path.name for path in finished if damage(path) is None) or "none"
        raise InputError(f"checkpoint {path} can't be used ({reason}): intact ones in {folder}: {known}")
    return read_checkpoint(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state of a checkpoint whose checksums are right.

    Raises:
        InputError: it is damaged, or holds no state that a run can have.
    """
    with input_faults(f"checkpoint {path}", "resume from an earlier one"):
        check_sums(path)
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(path, stored.train_state(content["progress"]))


def check_sums(path: Path) -> None:
    """Compare a checkpoint's files with their checksums.

    Raises:
        ValueError: a file is missing or differs.
    """
    if not (path / COMPLETED).is_file():
        raise ValueError("it was never finished")
    sums = json.loads((path / COMPLETED).read_text(encoding="utf-8"))
    if not isinstance(sums, dict) or not {TRAINED, STATE} <= sums.keys():
        raise ValueError(f"its file {COMPLETED} is damaged")
    for name, expected in sums.items():
        if Path(name).name != name or not (path / name).is_file():
            raise ValueError(f"{name[:60]} is missing")
        if sha256(path / name) != expected:
            raise ValueError(f"{name} does not match its checksum")


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Any,
    schedule: Any,
    accelerator: Accelerator,
) -> TrainState:
    """Restore everything as it was when the checkpoint was written: the one way to resume.

    The optimizer's hyperparameters and the schedule are functions of flags and step: nothing of them is read.

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
    shapes = {name: sharding.full_shape(parameter) for name, parameter in parameters.items()}
    with input_faults(f"checkpoint {path}", "resume from an earlier one"):
        values = load_file(path / TRAINED)
        stored.check_parameters(values, shapes, TRAINED)
        if state.best_step is not None:
            best = load_file(path / BEST)
            stored.check_parameters(best, shapes, BEST)
            state.best = best if accelerator.is_main_process else {}
        kept = stored.load_optimizer(path / (part or OPTIMIZER))
        if part is None:
            ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            own_shapes = [sharding.full_shape(parameter) for parameter in ordered]
            moments = stored.check_moments(kept, own_shapes, partial(first_state, optimizer))
            groups = optimizer.state_dict()["param_groups"]
            sharding.load_optimizer_state(optimizer, {"state": moments, "param_groups": groups})
        else:
            sharding.load_zero_state(sharding.zero_optimizer(optimizer), kept)
        sharding.load_full(parameters, values)
        set_step(schedule, state.step)
    accelerator.print(f"resuming after step {state.step} from {path}")
    return state
