"""Compare fine-tuning methods honestly: methods × hyperparameters × seeds on the same data, with an equal tuning budget each.

    python open_instruct/study_peft.py --config configs/studies/bundled.yaml

What is finished is kept: run the same command again after a kill, or with more seeds. docs/choosing.md says how to read the report.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.command_line import OneLineArgumentParser, at_least
from open_instruct.data import reading
from open_instruct.errors import InputError, exit_code
from open_instruct.model import loading
from open_instruct.study import config, report, search, trials, workers
from open_instruct.study.config import Study
from open_instruct.study.figures import Done, loss
from open_instruct.study.search import Trial
from open_instruct.training.examples import DEFAULT_MAX_SEQ_LENGTH, fill_virtual_tokens, num_virtual_tokens
from open_instruct.training.tracking import read_rows


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="STUDY.yaml", help="the study; configs/studies holds examples"
    )
    parser.add_argument("--output_dir", type=Path, help="folder of the study (default: the one that the file names)")
    parser.add_argument(
        "--workers", type=at_least(1), default=1, help="trials at a time, each on a GPU of its own if there are any"
    )
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="who runs several workers (default: local)"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="run only part I of N (from 0), as a task of a SLURM array does; no report"
    )
    parser.add_argument(
        "--report_only", action="store_true", help="write the report of what is finished, and run nothing"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check the study, print the trials that it begins with, and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: done; 2: wrong input; 130: interrupted, and can go on."""
    a = build_parser().parse_args(argv)
    return exit_code(lambda: run(a), interrupted="interrupted: what is finished is kept, and the same command goes on")


def run(a: argparse.Namespace) -> None:
    """Check everything, run what is missing, report."""
    study = config.read(a.config)
    if a.output_dir:
        study = replace(study, output_dir=a.output_dir)
    shard = parse_shard(a.shard)
    study = check(study)
    if a.dry_run:
        for trial in first_trials(study):
            print(f"{trial.entry}: {trial.label}\n  {report.command(command_words(study, trial))}")
        return
    if not a.report_only:
        open_study(study)
        with workers.choose(a.workers, a.engine) as runner:
            run_all(study, runner, shard)
    if shard == (0, 1):
        done, missing, bases = finished(study)
        source = study.path.read_text(encoding="utf-8")
        print(report.write(study.output_dir, study.name, source, done, bases, missing, a.workers))


def parse_shard(text: str | None) -> tuple[int, int]:
    """`I/N` → (I, N)."""
    parts = (text or "0/1").split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise InputError(f"--shard {text} is not I/N with I from 0 to N - 1: 0/8 is the first of eight parts")
    return int(parts[0]), int(parts[1])


def check(study: Study) -> Study:
    """Check the flags of every trial and the data's files, and give all trials the same --max_seq_length.

    Raises:
        InputError: naming the trial and what is wrong with it.
    """
    asked = []
    for trial in first_trials(study):
        try:
            asked.append(trials.arguments(trials.task(study, trial))[0])
        except InputError as error:
            raise InputError(f"study {study.path}, {trial.entry} ({trial.label}): {error}") from None
    a = asked[0]
    for source in [*(a.train_file or []), *([a.validation_file] if a.validation_file else [])]:
        reading.files_of(source)
    if a.validation_fraction == 0 and not a.validation_file:
        raise InputError(
            f"study {study.path}: without held-out rows nothing can be compared: set validation_file or validation_fraction"
        )
    if not a.max_seq_length:
        assert a.model_name_or_path
        model_config = loading.load_config(a.model_name_or_path, trust_remote_code=a.trust_remote_code)
        context = loading.context_length(model_config)
        for one in asked:
            fill_virtual_tokens(one, model_config)
        room = context and context - max(num_virtual_tokens(one) for one in asked)
        if room is not None and room < 2:
            raise InputError(
                f"study {study.path}: the model's context of {context} positions has no room beside the virtual tokens"
            )
        study = replace(
            study, flags={**study.flags, "max_seq_length": min(room or DEFAULT_MAX_SEQ_LENGTH, DEFAULT_MAX_SEQ_LENGTH)}
        )
    return study


def first_trials(study: Study) -> list[Trial]:
    """The trials that don't depend on others' results."""
    return [trial for entry in study.entries for trial in next(search.stages(study, entry))]


def open_study(study: Study) -> None:
    """Make the folder and keep the study's file in it."""
    try:
        study.output_dir.mkdir(parents=True, exist_ok=True)
        (study.output_dir / "study.yaml").write_bytes(study.path.read_bytes())
    except OSError as error:
        raise InputError(
            f"output_dir {study.output_dir} can't be written ({error.strerror}): name another folder"
        ) from None


def run_all(study: Study, runner: workers.Runner, shard: tuple[int, int]) -> None:
    """Stage after stage: every method's trials that can run now. Trials of a grid are shared out over shards, else whole methods."""
    whole_methods = study.kind != "grid"
    entries = workers.mine(study.entries, shard) if whole_methods else study.entries
    searches = [search.stages(study, entry) for entry in entries]
    stages = [next(one) for one in searches]
    started, done = time.monotonic(), 0
    while searches:
        tasks = [trials.task(study, trial) for stage in stages for trial in stage]
        tasks = tasks if whole_methods else workers.mine(tasks, shard)
        missing = [task for task in tasks if trials.result(task) is None]
        print(f"{len(tasks)} trials, {len(tasks) - len(missing)} of them done before", flush=True)
        for number, (task, found) in enumerate(runner(missing), start=1):
            done += 1
            left = (time.monotonic() - started) / done * (len(missing) - number)
            print(
                f"[{number}/{len(missing)}] {task.trial.entry}: {task.trial.label}: {outcome(found)}; {left:,.0f} s left",
                flush=True,
            )
        if not whole_methods:
            return
        going_on = []
        for one, stage in zip(searches, stages, strict=True):
            try:
                following = one.send({trial.key: choosing_loss(study, trial) for trial in stage})
            except StopIteration:
                continue
            going_on.append((one, following))
        searches, stages = [one for one, _ in going_on], [following for _, following in going_on]


def outcome(found: dict[str, Any]) -> str:
    """A finished trial in a few words."""
    if "failed" in found:
        return f"failed ({found['failed'][:100]})"
    return f"held-out loss {found['final_eval_loss']:.4f} (base {found['base_eval_loss']:.4f}), {found['wall_seconds']:.1f} s"


def command_words(study: Study, trial: Trial) -> list[str]:
    """A trial as a run of its own, beside the study's."""
    return [*trial.words, "--output_dir", str(Path("output", f"{study.name}-{trial.key}"))]


def choosing_loss(study: Study, trial: Trial) -> float:
    """Loss on the rows for choosing; infinite where the trial failed."""
    found = trials.result(trials.task(study, trial))
    return loss(found, "choosing") if found and "failed" not in found else float("inf")


def finished(study: Study) -> tuple[list[Done], int, dict[str, dict[str, Any]]]:
    """Every finished trial, the number of trials known to be missing, and the base's figures for each method.

    Raises:
        InputError: nothing is finished, or the data has changed meanwhile.
    """
    done: dict[str, Done] = {}
    missing = 0
    for entry in study.entries:
        going = search.stages(study, entry)
        stage = next(going)
        while True:
            found = {trial.key: record(study, trial) for trial in stage}
            done |= {key: one for key, one in found.items() if one is not None}
            absent = sum(one is None for one in found.values())
            missing += absent
            if absent:
                break
            try:
                stage = going.send({trial.key: choosing_loss(study, trial) for trial in stage})
            except StopIteration:
                break
    bases = {one.entry: one.base for one in done.values() if not one.failed}
    versions = {
        json.dumps(data) for one in done.values() if not one.failed for data in (one.summary["data"], one.base["data"])
    }
    if not bases:
        raise InputError(
            f"no trial of {study.path} has succeeded in {study.output_dir}: see trials/*/failed.json and log.txt there"
        )
    if len(versions) > 1:
        raise InputError(
            f"the data of {study.path} changed between trials in {study.output_dir}: name another output_dir"
        )
    return list(done.values()), missing, bases


def record(study: Study, trial: Trial) -> Done | None:
    """A trial as the report wants it; None where it has not finished."""
    task = trials.task(study, trial)
    found = trials.result(task)
    if found is None:
        return None
    failed = found.get("failed")
    flags = (
        json.loads((task.folder / "run.json").read_text(encoding="utf-8"))["flags"]
        if (task.folder / "run.json").exists()
        else {}
    )
    rows = read_rows(task.folder / "metrics.jsonl")
    path = trials.base_path(task, trials.arguments(task, check=False)[0])
    return Done(
        entry=trial.entry,
        point=dict(trial.point),
        seed=trial.seed,
        full_length=trial.full_length,
        command=report.command(command_words(study, trial)),
        folder=str(task.folder),
        failed=failed,
        summary=found,
        base=json.loads(path.read_text(encoding="utf-8")) if path.exists() else {},
        learning_rate=float(flags["learning_rate"]["value"]) if flags else math.nan,
        curve=[(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
    )


if __name__ == "__main__":
    sys.exit(main())
