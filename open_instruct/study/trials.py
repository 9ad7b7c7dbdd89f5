"""A trial of a study: its run folder, the flags that make it, and how it is run and measured.

Libraries that take seconds to import are imported where a trial runs, so that wrong flags are answered at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_instruct.command_line import parse
from open_instruct.errors import InputError, input_faults
from open_instruct.flags import Flags, check_flags
from open_instruct.locks import Occupied
from open_instruct.small_files import read_json
from open_instruct.study.config import Study
from open_instruct.study.search import Trial

if TYPE_CHECKING:
    from open_instruct.training.base_model import Bases

FAILED = "failed.json"
REPEAT = "run the study again, which repeats what is damaged"
MAX_BYTES = 1 << 30  # of a summary: it holds figures of every held-out row
NUMBERS = (
    "steps", "tokens", "wall_seconds", "peak_memory_mb", "trainable_parameters", "total_parameters", "adapter_bytes",
)  # fmt: skip
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
    """Return a trial's summary, {"failed": reason} if it failed, or None while it has not finished.

    A damaged outcome is none: the next run of the study repeats the trial.
    """
    try:
        return sound_outcome(task)
    except InputError:
        return None


def sound_outcome(task: Task) -> dict[str, Any] | None:
    """Return what `read_outcome` does.

    Raises:
        InputError: the outcome's file is damaged.
    """
    for name in ("summary.json", FAILED):
        path = task.folder / name
        if path.exists():
            content = read_json(path, str(path), REPEAT, MAX_BYTES)
            with input_faults(str(path), REPEAT):
                return {"failed": str(content["failed"])} if name == FAILED else checked_summary(content)
    return None


def checked_summary(content: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's summary with all that a report reads in it. Whatever it raises means damage."""
    summary = {**content, **checked_figures(content)}
    for name in NUMBERS:
        if isinstance(content[name], bool) or not math.isfinite(content[name]):
            raise ValueError(f"{name} is {content[name]!r}")
    for name in ("base_eval_loss", "final_eval_loss"):
        summary[name] = loss_of(content[name])
    return summary


def checked_figures(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that `measure_trial` made, of a trial or a base. Whatever it raises means damage."""
    study = content["study"]
    rows = {name: [[loss_of(loss), int(count)] for loss, count in study[name]] for name in ("rows", "other")}
    for name in ("choosing", "test"):
        if min(study[name]) < 0 or not sum(rows["rows"][index][1] for index in study[name]) > 0:
            raise ValueError(f"{name} names no labelled token")
    if rows["other"] and not sum(count for _, count in rows["other"]) > 0:
        raise ValueError("the other text has no token")
    exact = [float(match) for match in study["exact"]]
    texts = {name: [str(text) for text in study.get(name, [])] for name in ("answers", "references")}
    if any(len(each) != (len(exact) if "asked" in study else 0) for each in texts.values()):
        raise ValueError("it has not an answer and a reference for each question")
    files = {name: checked_file(file) for name, file in study.get("files", {}).items()}
    asked = {"asked": dict(study["asked"])} if "asked" in study else {}
    figures = {**study, **rows, **texts, **asked, "files": files, "exact": exact, "device": str(study["device"])}
    return {"study": figures, "data": dict(content["data"])}


def checked_file(content: dict[str, Any]) -> dict[str, Any]:
    """Return what `ask_file` measured. Whatever it raises means damage."""
    losses = [[loss_of(loss), int(count)] for loss, count in content["losses"]]
    texts = {name: [str(text) for text in content[name]] for name in ("answers", "references")}
    if not sum(count for _, count in losses) > 0 or any(len(each) != len(losses) for each in texts.values()):
        raise ValueError("a file has no labelled token, or not an answer and a reference for each question")
    return {"losses": losses, **texts}


def loss_of(value: Any) -> float:
    """Return a loss; one that is not finite stands in JSON as null."""
    return math.nan if value is None else float(value)


def read_base(path: Path) -> dict[str, Any] | None:
    """Return the figures of a base model; None where its file is missing or damaged, so that they are measured anew."""
    if not path.exists():
        return None
    with suppress(InputError):
        content = read_json(path, str(path), REPEAT, MAX_BYTES)
        with input_faults(str(path), REPEAT):
            return {"quantised": content["quantised"], **checked_figures(content)}
    return None


def asked_otherwise(study: Study, figures: dict[str, Any]) -> str | None:
    """Return in which settings figures were measured that are not the study's now, or None.

    Args:
        study: the study.
        figures: what `measure_trial` made, of a trial or a base.
    """
    asked = figures["study"].get("asked")
    if asked is None:  # of an older version
        return "no answers were kept, which its metrics need" if study.metrics or study.similarity_model else None
    different = [
        f"{name} was {asked.get(name)!r} and is {now!r}" for name, now in study.asked.items() if asked.get(name) != now
    ]
    return "; ".join(different) or None


def check_asked(task: Task, outcome: dict[str, Any] | None) -> None:
    """Refuse a finished trial that was measured with other settings than the study has now.

    Raises:
        InputError: it was.
    """
    if outcome and "failed" not in outcome and (different := asked_otherwise(task.study, outcome)):
        raise InputError(
            f"study {task.study.path}: {task.folder} was finished with another report ({different}): "
            "give the same, or name another output_dir"
        )


def sound_base(task: Task, path: Path) -> dict[str, Any] | None:
    """Return the figures of a base model; None where they are missing, damaged, or measured with other settings."""
    base = read_base(path)
    return None if base is None or asked_otherwise(task.study, base) else base


def is_finished(task: Task) -> bool:
    """Whether a trial's outcome is there, and the figures of its base with which a success is compared."""
    from open_instruct.training.base_model import base_model_settings

    outcome = read_outcome(task)
    if outcome is None or "failed" in outcome:
        return outcome is not None
    key = base_model_settings(trial_flags(task, check=False)[0]).key
    return sound_base(task, base_path(task, key)) is not None


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
    from open_instruct.methods import method_of
    from open_instruct.study.measuring import measure_trial
    from open_instruct.training.checkpoint import complete_checkpoints, damage
    from open_instruct.training.preemption import Preempted, RunGuard
    from open_instruct.training.run import run
    from open_instruct.training.run_folder import RunFolder

    outcome = read_outcome(task)
    if outcome is not None and is_finished(task):
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
        if outcome is not None:  # only its base had to be measured
            return outcome
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with RunGuard() as guard:
                run(flags, origins, guard, bases, functools.partial(measure_trial, task.study))
        except Occupied:  # nothing may be written there, not even that it failed
            raise
        except InputError as error:  # diverged, or out of memory: a result of the study, not its end
            bases.loaded.clear()
            write_json(task.folder / FAILED, {"failed": str(error)})
        except Preempted:  # its checkpoint is written, and the next start continues from it
            raise KeyboardInterrupt from None
    own = RunFolder.read(task.folder)
    if method_of(flags.method, flags.peft_config).trains_base and not task.study.keep_full_weights:
        own.remove(*own.has("model*.safetensors*"))
    own.remove(*own.has("checkpoints/*"))
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
    from open_instruct.training.base_model import base_model_settings
    from open_instruct.training.hard_prompts import with_hard_prompt
    from open_instruct.training.load_data import load_data
    from open_instruct.training.settings import before_data

    base_settings = base_model_settings(flags)
    path = base_path(task, base_settings.key)
    figures = sound_base(task, path)
    if figures is None:
        silence_transformers()
        config = base_model.load_base_config(base_settings)
        settings = before_data(flags, {}, config)
        accelerator = engines.make_accelerator(settings.processes)
        tokenizer = base_model.load_base_tokenizer(settings.tokenizer)
        settings = with_hard_prompt(settings, config, tokenizer)
        data = load_data(settings.data, accelerator, tokenizer)
        if data.held_out_answers is None or len(data.held_out_answers) < MIN_HELD_OUT_ROWS:
            raise InputError(
                f"a study needs {MIN_HELD_OUT_ROWS} held-out rows at least, half of them for choosing: "
                "give a longer validation_file"
            )
        with torch.no_grad():
            base = bases.take(settings.model, config, tokenizer, accelerator)
            quantised = settings.model.quantise
            figures = {"quantised": quantised, **measure_trial(task.study, base, tokenizer, data)}
            write_json(path, figures)
    return figures


def base_path(task: Task, base_key: str) -> Path:
    """Return the file of the figures of a base model, named by what decides them (`BaseModelSettings.key`)."""
    return task.study.output_dir / f"base-{hashlib.sha256(base_key.encode()).hexdigest()[:8]}.json"
