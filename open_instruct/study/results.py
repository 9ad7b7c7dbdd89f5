"""Finished trials, as they are read back from their run folders."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_instruct import small_files
from open_instruct.errors import InputError, input_faults, warn
from open_instruct.ranking import finite_or_inf
from open_instruct.study import search, trials
from open_instruct.study.config import Study
from open_instruct.study.search import Trial


@dataclass(frozen=True)
class TrialResult:
    """A finished trial, whether it succeeded or failed."""

    spec_name: str
    params: dict[str, Any]
    seed: int
    full_length: bool
    command: str
    folder: str
    failed: str | None  # the reason
    summary: dict[str, Any]
    base: dict[str, Any]  # figures of the base model that it started from
    learning_rate: float
    curve: list[tuple[int, float]]  # (step, held-out loss)

    @property
    def choosing_loss(self) -> float:
        """Return the loss by which parameters are chosen, infinite if the trial failed or the loss is not finite."""
        return math.inf if self.failed else finite_or_inf(split_loss(self.summary, "choosing"))

    @property
    def test_loss(self) -> float:
        """Return the loss on the test rows, in nats per labelled token."""
        return split_loss(self.summary, "test")


@dataclass(frozen=True)
class StudyResults:
    """Results that a study has computed so far."""

    trials: list[TrialResult]
    num_missing: int  # trials that are known to be needed and have not finished
    bases: dict[str, dict[str, Any]]  # figures of the base model that each method started from, by the method's name
    damaged: list[str]  # what is wrong with the files of trials that count as missing for it


def split_loss(summary: dict[str, Any], part: str) -> float:
    """Return the loss on a part of the held-out rows, "choosing" or "test", in nats per labelled token."""
    rows = [summary["study"]["rows"][i] for i in summary["study"][part]]
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def other_loss(summary: dict[str, Any]) -> float:
    """Return the loss on text that was not trained for, in nats per token; nan where the study has none."""
    rows = summary["study"]["other"]
    return sum(row[0] for row in rows) / sum(row[1] for row in rows) if rows else math.nan


def params_name(params: dict[str, Any]) -> str:
    """Return parameters as readable text."""
    return ", ".join(f"{name} {value}" for name, value in params.items()) or "the recipe"


def command(words: Sequence[str]) -> str:
    """Return the command that runs the trainer with these words."""
    return "python open_instruct/finetune_peft.py " + shlex.join(words)


def trial_command(study: Study, trial: Trial) -> str:
    """Return the command that repeats a trial outside of its study."""
    return command([*trial.words, "--output_dir", str(Path("output", f"{study.name}-{trial.key}"))])


def choosing_loss(study: Study, trial: Trial) -> float:
    """Return a trial's loss on the rows for choosing; infinite if it failed, or was left to another shard."""
    outcome = trials.read_outcome(trials.Task(study, trial))
    return split_loss(outcome, "choosing") if outcome and "failed" not in outcome else math.inf


def collect(study: Study) -> StudyResults:
    """Read all finished trials of a study.

    Raises:
        InputError: no trial has succeeded, or the data, or what trials were asked, changed between trials.
    """
    by_key: dict[str, TrialResult] = {}
    damaged: list[str] = []
    num_missing = 0
    for spec in study.specs:
        losses: dict[str, float] = {}
        while stage := search.next_trials(study, spec, losses):
            for trial in stage:
                task = trials.Task(study, trial)
                trials.check_asked(task, trials.read_outcome(task))
            results = {trial.key: read_or_note(study, trial, damaged) for trial in stage}
            finished = {key: result for key, result in results.items() if result is not None}
            by_key |= finished
            if len(finished) < len(results):
                num_missing += len(results) - len(finished)
                break
            losses |= {key: result.choosing_loss for key, result in finished.items()}
    succeeded = [result for result in by_key.values() if not result.failed]
    for text in damaged:
        warn(text)
    if not succeeded:
        raise InputError(
            f"no trial of {study.path} has succeeded in {study.output_dir}: see trials/*/failed.json and log.txt there"
        )
    fingerprints = {json.dumps(data) for result in succeeded for data in (result.summary["data"], result.base["data"])}
    if len(fingerprints) > 1:
        raise InputError(
            f"the data of {study.path} changed between trials in {study.output_dir}: name another output_dir"
        )
    bases = {result.spec_name: result.base for result in succeeded}
    return StudyResults(list(by_key.values()), num_missing, bases, damaged)


def read_or_note(study: Study, trial: Trial, damaged: list[str]) -> TrialResult | None:
    """Read a trial's run folder; None where it is damaged, which is added to `damaged`, or not finished."""
    try:
        return read_result(study, trial)
    except InputError as error:
        damaged.append(f"{trial.spec_name} ({trial.label}): {error}")
        return None


def read_result(study: Study, trial: Trial) -> TrialResult | None:
    """Read a trial's run folder; None while it has not finished.

    Raises:
        InputError: a file of it, or of its base, is damaged.
    """
    from open_instruct.training.base_model import base_model_settings  # these import torch
    from open_instruct.training.tracking import read_metrics

    task = trials.Task(study, trial)
    summary = trials.sound_outcome(task)
    if summary is None:
        return None
    rate, curve, base = math.nan, [], None
    if "failed" not in summary:
        base_path = trials.base_path(task, base_model_settings(trials.trial_flags(task, check=False)[0]).key)
        base = trials.sound_base(task, base_path)
        with input_faults(str(base_path), trials.REPEAT):
            if base is None or (base["data"] == summary["data"] and not same_rows(base, summary)):
                raise ValueError("it is missing or damaged, or has other rows than the trial")
    run_file = task.folder / "run.json"
    if run_file.exists():
        content = small_files.read_json(run_file, str(run_file), f"delete {task.folder}, and {trials.REPEAT}")
        with input_faults(str(run_file), f"delete {task.folder}, and {trials.REPEAT}"):
            rate = float(content["flags"]["learning_rate"]["value"])
    metrics, remedy = task.folder / "metrics.jsonl", f"delete {task.folder}, and {trials.REPEAT}"
    lines = (
        small_files.read_text(metrics, str(metrics), remedy, trials.MAX_BYTES).splitlines() if metrics.exists() else []
    )
    with input_faults(str(metrics), remedy):
        rows = read_metrics(metrics)
        if len(rows) < len(lines):
            raise ValueError("a line is no row")
        curve = [(int(row["step"]), trials.loss_of(row["eval_loss"])) for row in rows if "eval_loss" in row]
    return TrialResult(
        spec_name=trial.spec_name,
        params=dict(trial.params),
        seed=trial.seed,
        full_length=trial.full_length,
        command=trial_command(study, trial),
        folder=str(task.folder),
        failed=summary.get("failed"),
        summary=summary,
        base=base or {},
        learning_rate=rate,
        curve=curve,
    )


def same_rows(base: dict[str, Any], summary: dict[str, Any]) -> bool:
    """Whether a base and a trial were measured on the same rows, questions and other text."""
    figures = base["study"], summary["study"]
    parts = ("rows", "choosing", "test", "other", "exact")
    return all(len({len(each[part]) for each in figures}) == 1 for part in parts)
