"""Resumable state: every trained parameter, the optimizer, the schedule, and the place in the plan.

PEFT's own save keeps only what inference needs: P-tuning's network and a prefix's projection would be lost. Random
numbers and the order of examples are functions of seed and step, so they need no state.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from open_instruct.data.writing import flush, write_json
from open_instruct.errors import InputError

MARK = "COMPLETED"


@dataclass
class Progress:
    """How far a run has come; everything that a resumed run has to know besides tensors."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    train_seconds: float = 0.0  # steps alone
    wall_seconds: float = 0.0  # evaluations and saves included
    base_eval_loss: float | None = None
    initial_eval_loss: float | None = None
    final_eval_loss: float | None = None
    identity: dict[str, Any] = field(default_factory=dict)  # what a resumed run must share; see `check_identity`

    def advance(self, num_examples: int, tokens: int, label_tokens: int, seconds: float) -> None:
        """One more step is done."""
        self.step += 1
        self.examples += num_examples
        self.tokens += tokens
        self.label_tokens += label_tokens
        self.train_seconds += seconds

    def record_eval(self, loss: float) -> None:
        """A held-out loss was measured. The first is the start; where no base was measured, the start is the base."""
        if self.step == 0:
            self.initial_eval_loss = loss
            self.base_eval_loss = loss if self.base_eval_loss is None else self.base_eval_loss
        self.final_eval_loss = loss

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that a resumed run adds up."""
        return {
            "base_eval_loss": self.base_eval_loss,
            "initial_eval_loss": self.initial_eval_loss,
            "final_eval_loss": self.final_eval_loss,
            "steps": self.step,
            "examples": self.examples,
            "tokens": self.tokens,
            "wall_seconds": round(self.wall_seconds, 2),
            "tokens_per_second": round(self.tokens / self.train_seconds, 1) if self.train_seconds else None,
        }


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, progress: Progress, keep: int) -> None:
    """Write `folder`/step_N under a temporary name, flush it to disk, rename it, mark it; then drop the oldest beyond `keep`."""
    working = folder / f".step_{progress.step}.writing"
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir(parents=True)
        _write(working, model, optimizer, schedule, progress)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    if keep >= 0:
        for old in complete_checkpoints(folder)[: -max(keep, 1)]:
            shutil.rmtree(old)


def _write(working: Path, model: nn.Module, optimizer: Any, schedule: Any, progress: Progress) -> None:
    """Fill `working`, give it its final name, and mark it with the checksums of its files."""
    final = working.parent / f"step_{progress.step}"
    tensors = {name: parameter.detach().contiguous().cpu() for name, parameter in trained_parameters(model).items()}
    save_file(tensors, working / "trained.safetensors")
    torch.save(optimizer.state_dict(), working / "optimizer.pt")
    state = {"progress": asdict(progress), "schedule": schedule.state_dict()}
    (working / "state.json").write_text(json.dumps(state, indent=2, default=str))
    for path in working.iterdir():
        flush(path)
    sums = {path.name: sha256(path) for path in sorted(working.iterdir())}
    shutil.rmtree(final, ignore_errors=True)
    os.replace(working, final)
    write_json(final / MARK, sums)
    flush(working.parent)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest first. Whether their files are still whole is asked by `damage`."""
    found = [path for path in folder.glob("step_*") if (path / MARK).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, by the checksums that it was marked with; None if it is whole."""
    try:
        sums = json.loads((path / MARK).read_text())
    except (OSError, ValueError):
        return "it was never finished"
    for name, expected in sums.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != expected:
            return f"{name} is not what was written"
    return None


def sha256(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def find_checkpoint(wanted: str, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: a path, or the newest complete one (None where there is none yet).

    Raises:
        InputError: the path is no complete checkpoint.
    """
    if wanted == "newest":
        for path in reversed(complete_checkpoints(output_dir / "checkpoints")):
            reason = damage(path)
            if reason is None:
                return path
            print(f"warning: checkpoint {path} is damaged ({reason}): taking the one before", file=sys.stderr)
        return None
    path = Path(wanted)
    reason = damage(path) if path.is_dir() else "it does not exist"
    if reason:
        known = ", ".join(p.name for p in complete_checkpoints(output_dir / "checkpoints") if damage(p) is None) or "none"
        raise InputError(f"checkpoint {path} can't be used ({reason}): whole ones in {output_dir / 'checkpoints'} are {known}")
    return path


def read_progress(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Progress and schedule state of a checkpoint."""
    try:
        state = json.loads((path / "state.json").read_text())
        return Progress(**state["progress"]), state["schedule"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} can't be read ({error}): resume from an earlier one") from None


def check_identity(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A resumed run must be the same run.

    Raises:
        InputError: naming what differs, with both values.
    """
    different = [f"{name} was {saved.get(name)!r} and is now {value!r}" for name, value in current.items() if saved.get(name) != value]
    if different:
        raise InputError(f"checkpoint {path} belongs to another run ({'; '.join(different)}): give the same values, or a new --output_dir")


def resume(path: Path, model: nn.Module, optimizer: Any, schedule: Any, identity: dict[str, Any]) -> Progress:
    """Put a checkpoint's state into model, optimizer and schedule.

    Raises:
        InputError: the files are damaged or belong to another run.
    """
    progress, schedule_state = read_progress(path)
    check_identity(path, progress.identity, identity)
    parameters = trained_parameters(model)
    try:
        tensors = load_file(path / "trained.safetensors")
        optimizer_state = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}): resume from an earlier one") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise InputError(f"checkpoint {path} holds other parameters than this run trains: give the same method and sizes")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(optimizer_state)
    schedule.load_state_dict(schedule_state)
    return progress
