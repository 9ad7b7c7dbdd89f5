"""A trial of a study: its run folder, the flags that make it, and how it is run and measured.

Libraries that take seconds to import are imported where a trial runs, so that wrong flags are answered at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_instruct.command_line import parse
from open_instruct.errors import InputError, input_faults
from open_instruct.flags import Flags, check_flags
from open_instruct.study.config import Study
from open_instruct.study.search import Trial

if TYPE_CHECKING:
    from open_instruct.training.base_model import Bases

FAILED = "failed.json"
MIN_HELD_OUT_ROWS = 4  # half of them choose the parameters, half are for the report


@dataclass(frozen=True)
class Task:
    """A trial with the study that it belongs to: all that a worker needs to run it."""

    study: Study
    trial: Trial

    @property
    def folder(self) -> Path:
        """Return the run folder."""
        return self.study.output_dir / "trials" / self.trial.key


def trial_flags(task: Task, check: bool = True) -> tuple[Flags, dict[str, str]]:
    """Return the trainer's flags of a trial, and where each given one came from.

    Raises:
        InputError: the flags are wrong.
    """
    flags, origins = parse([*task.trial.words, "--output_dir", str(task.folder)])
    if check:
        check_flags(flags, origins)
    return flags, origins


def read_outcome(task: Task) -> dict[str, Any] | None:
    """Return a trial's summary, {"failed": reason} if it failed, or None while it has not finished."""
    for name in ("summary.json", FAILED):
        if (task.folder / name).exists():
            return read_figures(task.folder / name)
    return None


def read_figures(path: Path) -> dict[str, Any]:
    """Read a trial's summary, or the figures of a base model. Losses that were not finite, null in the file, are nan.

    Args:
        path: summary.json, failed.json or base-*.json.

    Raises:
        InputError: it is damaged.
    """
    with input_faults(f"result {path}", "delete its folder, and the trial is run again"):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("rows", "other"):
            rows = content.get("study", {}).get(name)
            if rows:
                content["study"][name] = [[math.nan if loss is None else loss, count] for loss, count in rows]
        return content


def run_trial(task: Task, bases: Bases) -> dict[str, Any]:
    """Run a trial unless it has finished. After a kill it starts anew, or from its newest checkpoint if it keeps any.

    Args:
        task: the trial.
        bases: the base models that this process has loaded.

    Returns:
        The outcome, as `read_outcome` does.

    Raises:
        InputError: something that all trials share is wrong. What goes wrong in this trial alone is its outcome.
    """
    from accelerate.state import AcceleratorState

    from open_instruct.files import write_json
    from open_instruct.methods import METHODS
    from open_instruct.study.measuring import measure_trial
    from open_instruct.training.checkpoint import complete_checkpoints, damage
    from open_instruct.training.preemption import Preempted
    from open_instruct.training.run import run

    outcome = read_outcome(task)
    if outcome is not None:
        return outcome
    flags, origins = trial_flags(task)
    task.folder.mkdir(parents=True, exist_ok=True)
    if any(damage(path) is None for path in complete_checkpoints(task.folder / "checkpoints")):
        flags = replace(flags, resume_from_checkpoint="newest")
    else:
        flags = replace(flags, overwrite_output_dir=True)
    with (
        (task.folder / "log.txt").open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps one precision per process
        base_figures(task, flags, bases)  # wrong data or a wrong model end the study
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            run(flags, origins, bases, functools.partial(measure_trial, task.study))
        except InputError as error:  # diverged, or out of memory: a result of the study, not its end
            bases.loaded.clear()
            write_json(task.folder / FAILED, {"failed": str(error)})
        except Preempted:  # its checkpoint is written, and the next start continues from it
            raise KeyboardInterrupt from None
    if METHODS[flags.method].trains_base and not task.study.keep_full_weights:
        for path in task.folder.glob("model*.safetensors*"):
            path.unlink()
    shutil.rmtree(task.folder / "checkpoints", ignore_errors=True)
    outcome = read_outcome(task)
    assert outcome is not None
    return outcome


def base_figures(task: Task, flags: Flags, bases: Bases) -> dict[str, Any]:
    """Return the figures of a trial's base model, which are measured once for each way in which it is loaded."""
    import torch

    from open_instruct.files import write_json
    from open_instruct.quiet import silence_transformers
    from open_instruct.study.measuring import measure_trial
    from open_instruct.training import base_model, engines
    from open_instruct.training.load_data import load_data
    from open_instruct.training.settings import base_model_settings, before_data

    base_settings = base_model_settings(flags)
    path = base_path(task, base_settings.key)
    if not path.exists():
        silence_transformers()
        config = base_model.load_base_config(base_settings)
        settings = before_data(flags, {}, config)
        accelerator = engines.make_accelerator(settings.processes)
        tokenizer = base_model.load_base_tokenizer(settings.tokenizer)
        data = load_data(settings.data, accelerator, tokenizer)
        if data.held_out is None or len(data.held_out) < MIN_HELD_OUT_ROWS:
            raise InputError(
                f"a study needs {MIN_HELD_OUT_ROWS} held-out rows at least, half of them for choosing: "
                "give a longer validation_file"
            )
        with torch.no_grad():
            base = bases.take(settings.model, config, tokenizer, accelerator)
            quantised = settings.model.quantise
            write_json(path, {"quantised": quantised, **measure_trial(task.study, base, tokenizer, data)})
    return read_figures(path)


def base_path(task: Task, base_key: str) -> Path:
    """Return the file of the figures of a base model, named by what decides them (`BaseModelSettings.key`)."""
    return task.study.output_dir / f"base-{hashlib.sha256(base_key.encode()).hexdigest()[:8]}.json"
