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

from open_instruct.errors import InputError
from open_instruct.files import flush, write_json
from open_instruct.training import engines

MARK = "COMPLETED"
BEST = "best.safetensors"  # parameters of the lowest held-out loss so far
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk, as Python, torch and safetensors report it


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
    best_eval_loss: float | None = None  # after a step; not kept with --keep_best False
    best_step: int | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)  # of the loss doctor
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

    @property
    def best_is_earlier(self) -> bool:
        """Whether the parameters to save are not the last ones."""
        return self.best_step is not None and self.best_step < self.step

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that a resumed run adds up. The final loss is that of the parameters that are saved."""
        return {
            "base_eval_loss": self.base_eval_loss,
            "initial_eval_loss": self.initial_eval_loss,
            "final_eval_loss": self.best_eval_loss if self.best_is_earlier else self.final_eval_loss,
            "last_eval_loss": self.final_eval_loss,
            "saved_step": self.best_step if self.best_is_earlier else self.step,
            "findings": self.findings,
            "steps": self.step,
            "examples": self.examples,
            "tokens": self.tokens,
            "wall_seconds": round(self.wall_seconds, 2),
            "tokens_per_second": round(self.tokens / self.train_seconds, 1) if self.train_seconds else None,
        }


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    schedule: Any,
    progress: Progress,
    best: dict[str, torch.Tensor],
    keep: int,
    accelerator: Any,
) -> str | None:
    """Write `folder`/step_N under a temporary name, flush it to disk, rename it, mark it; then drop the oldest beyond `keep`.

    Every process calls this. The main one writes, whoever holds the tensors; under ZeRO each one adds its part of the optimizer, into
    the same folder, which all nodes must share.

    Returns:
        None, or why the checkpoint could not be written; older ones are untouched then.
    """
    working = folder / f".step_{progress.step}.writing"
    rank, part, zero = accelerator.process_index, engines.part_name(accelerator), engines.zero_optimizer(optimizer)
    tensors = engines.whole(trained_parameters(model), accelerator)
    optimizer_state = engines.optimizer_state(optimizer) if zero is None else None
    problem = None
    try:
        if rank == 0:
            shutil.rmtree(working, ignore_errors=True)
            working.mkdir(parents=True)
            save_file(tensors, working / "trained.safetensors")
            if best:
                save_file(best, working / BEST)
            state = {"progress": asdict(progress), "schedule": schedule.state_dict()}
            (working / "state.json").write_text(json.dumps(state, indent=2, default=str))
            if optimizer_state is not None:
                torch.save(optimizer_state, working / "optimizer.pt")
    except WRITE_ERRORS as error:
        problem = " ".join(str(error).split())
    accelerator.wait_for_everyone()
    if part is not None:
        state = engines.zero_state(zero)
        try:
            torch.save(state, working / part)
        except WRITE_ERRORS as error:
            problem = problem or " ".join(str(error).split())
    failed = accelerator.reduce(
        torch.tensor(float(problem is not None), device=accelerator.device), reduction="sum"
    ).item()
    if rank == 0 and not failed:
        try:
            _finish(working, folder / f"step_{progress.step}")
            for old in complete_checkpoints(folder)[: -max(keep, 1)] if keep >= 0 else []:
                shutil.rmtree(old)
        except WRITE_ERRORS as error:
            problem = " ".join(str(error).split())
    if rank == 0:
        shutil.rmtree(working, ignore_errors=True)
    accelerator.wait_for_everyone()
    return problem or ("another process could not write" if failed else None)


def _finish(working: Path, final: Path) -> None:
    """Flush a filled folder to disk, give it its final name, and mark it with the checksums of its files."""
    for path in working.iterdir():
        flush(path)
    sums = {path.name: sha256(path) for path in sorted(working.iterdir())}
    shutil.rmtree(final, ignore_errors=True)
    os.replace(working, final)
    write_json(final / MARK, sums)
    flush(final.parent)


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
        known = (
            ", ".join(p.name for p in complete_checkpoints(output_dir / "checkpoints") if damage(p) is None) or "none"
        )
        raise InputError(
            f"checkpoint {path} can't be used ({reason}): whole ones in {output_dir / 'checkpoints'} are {known}"
        )
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
    different = [
        f"{name} was {saved.get(name)!r} and is now {value!r}"
        for name, value in current.items()
        if saved.get(name) != value
    ]
    if different:
        raise InputError(
            f"checkpoint {path} belongs to another run ({'; '.join(different)}): give the same values, or a new --output_dir"
        )


def resume(path: Path, model: nn.Module, identity: dict[str, Any], part: str | None) -> Progress:
    """Put a checkpoint's trained parameters into a model, before it is prepared for several processes.

    Args:
        path: of the checkpoint.
        model: with the adapter; on the meta device where another process has its values.
        identity: what the run must share with the one that wrote the checkpoint.
        part: under ZeRO, the name of this process's part of the optimizer.

    Raises:
        InputError: the files are damaged, or belong to another run or engine.
    """
    progress, _ = read_progress(path)
    check_identity(path, progress.identity, identity)
    parameters = trained_parameters(model)
    if not (path / (part or "optimizer.pt")).exists():
        written = ", ".join(sorted(file.name for file in path.glob("optimizer*")))
        raise InputError(
            f"checkpoint {path} was written by another engine or, under ZeRO, another number of processes (it holds {written}): "
            "resume with those; only one process, DDP and FSDP can go on from each other's checkpoints"
        )
    try:
        tensors = load_file(path / "trained.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}): resume from an earlier one") from None
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise InputError(
            f"checkpoint {path} holds other parameters than this run trains: give the same method and sizes"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return progress


def resume_best(path: Path, progress: Progress) -> dict[str, torch.Tensor]:
    """The parameters with the lowest held-out loss before a checkpoint that `resume` has accepted; none where none were kept."""
    if progress.best_step is None:
        return {}
    try:
        found: dict[str, torch.Tensor] = load_file(path / BEST)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}): resume from an earlier one") from None
    return found


def resume_optimizer(path: Path, optimizer: Any, schedule: Any, part: str | None) -> None:
    """Put the rest of a checkpoint back, once model and optimizer are prepared.

    Args:
        path: of the checkpoint, which `resume` has accepted.
        optimizer: as accelerate prepared it.
        schedule: of the learning rate.
        part: see `resume`.
    """
    try:
        state = torch.load(path / (part or "optimizer.pt"), weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}): resume from an earlier one") from None
    if part is None:
        engines.load_optimizer_state(optimizer, state)
    else:
        engines.load_zero_state(engines.zero_optimizer(optimizer), state)
    schedule.load_state_dict(read_progress(path)[1])
