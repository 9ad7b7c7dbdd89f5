"""Compare fine-tuning methods honestly: methods × hyperparameters × seeds on the same data, an equal budget for each.

    python open_instruct/study_peft.py --config configs/studies/bundled.yaml

Finished trials are kept: run the same command again after a kill, or with more seeds. docs/choosing.md says how to
read the report.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # was open_instruct/, whose modules would shadow others

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.command_line import OneLineArgumentParser, at_least
from open_instruct.errors import InputError, exit_code
from open_instruct.interrupts import ending_at_once
from open_instruct.study import config, folder, results, search, trials
from open_instruct.study.answers import load_measures
from open_instruct.study.config import Study
from open_instruct.study.search import Trial

if TYPE_CHECKING:
    from open_instruct.study import workers


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, required=True, metavar="STUDY.yaml", help="the study; configs/studies holds examples"
    )
    parser.add_argument("--output_dir", type=Path, help="folder of the study (default: the one named in the file)")
    parser.add_argument(
        "--workers",
        type=at_least(1, 4096),
        default=1,
        help="number of trials that run at a time, each on its own GPU if there are any",
    )
    parser.add_argument(
        "--engine", choices=["local", "ray"], default="local", help="how several workers are run (default: local)"
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="run only part I of N (from 0), as a task of a SLURM array does; no report"
    )
    parser.add_argument("--report_only", action="store_true", help="only write the report of the finished trials")
    parser.add_argument(
        "--dry_run", action="store_true", help="check the study, print the trials that it begins with, and stop"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study. Exit code 0: done; 2: wrong input; 130: interrupted, can be continued."""
    return exit_code(
        lambda: run(build_parser().parse_args(argv)),
        interrupted="interrupted: what is finished is kept, and the same command continues",
        without_reader=True,
    )


def run(args: argparse.Namespace) -> None:
    """Check everything, run what is missing, report."""
    study = config.read_study(args.config)
    if args.output_dir:
        study = replace(study, output_dir=args.output_dir)
    shard = parse_shard(args.shard)
    study = check(study)
    measures = load_measures(study)
    if args.dry_run:
        for trial in first_trials(study):
            print(f"{trial.spec_name}: {trial.label}\n  {results.trial_command(study, trial)}")
        return

    with ending_at_once():
        from open_instruct.study import report, workers  # torch and matplotlib: seconds that a mistake need not cost

    with folder.opened(study, shard):
        if not args.report_only:
            with workers.choose_runner(args.workers, args.engine) as runner:
                run_all(study, runner, shard)
        if shard == (0, 1):
            print(report.write_report(study, results.collect(study), args.workers, measures))


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return (I, N) of `I/N`; (0, 1) of None."""
    index, _, number = (text or "0/1").partition("/")
    try:
        num_shards = at_least(1)(number)
        return at_least(0, num_shards - 1)(index), num_shards
    except argparse.ArgumentTypeError:
        raise InputError(f"--shard {text} is not I/N with I from 0 to N - 1: 0/8 is the first of eight parts") from None


def check(study: Study) -> Study:
    """Check the flags of every trial and the data's files, and give all trials the same --max_seq_length.

    Raises:
        InputError: something is wrong; the trial is named.
    """
    trial_flags = []
    for trial in first_trials(study):
        try:
            trial_flags.append(trials.trial_flags(trials.Task(study, trial))[0])
        except InputError as error:
            raise InputError(f"study {study.path}, {trial.spec_name} ({trial.label}): {error}") from None

    from open_instruct.data import reading
    from open_instruct.study import other_text

    first = trial_flags[0]
    for source in [*(first.train_file or []), *([first.validation_file] if first.validation_file else [])]:
        reading.files_of(source)
    if first.validation_fraction == 0 and not first.validation_file:
        raise InputError(
            f"study {study.path}: without held-out rows nothing can be compared: "
            "set validation_file or validation_fraction"
        )
    if study.files and first.hard_prompt:
        raise InputError(
            f"study {study.path}: report.files can't be asked behind flags.hard_prompt yet: drop one of them"
        )
    if study.other_text or study.files or not first.max_seq_length:
        from open_instruct.training import base_model
        from open_instruct.training.base_model import base_model_settings
        from open_instruct.training.settings import before_data

        model_config = base_model.load_base_config(base_model_settings(first))
    if study.other_text:
        other_text.check_other_text(study.other_text, model_config.is_encoder_decoder)
    if study.files:
        from open_instruct.study.measuring import file_questions
        from open_instruct.training.load_data import drawn_rendering

        settings = before_data(first, {}, model_config)
        tokenizer, rendering = base_model.load_base_tokenizer(settings.tokenizer), drawn_rendering(settings.data)
        for _, file in study.files:
            file_questions(study, file, rendering, tokenizer)
    if not first.max_seq_length:
        try:
            lengths = [before_data(flags, {}, model_config).data.max_length for flags in trial_flags]
        except InputError as error:
            raise InputError(f"study {study.path}: {error}") from None
        study = replace(study, flags={**study.flags, "max_seq_length": min(lengths)})
    return study


def first_trials(study: Study) -> list[Trial]:
    """Return the trials that don't depend on the results of others."""
    return [trial for spec in study.specs for trial in search.next_trials(study, spec, {})]


def run_all(study: Study, runner: workers.Runner, shard: tuple[int, int]) -> None:
    """Run the study's trials, stage after stage: in each, the trials of all methods that can run now.

    A shard is every N-th trial of a grid, or every N-th method of a search, whose later trials depend on earlier ones.
    """
    from open_instruct.study.workers import shard_of

    is_grid = study.search_kind == "grid"
    specs = list(study.specs) if is_grid else shard_of(study.specs, shard)
    losses: dict[str, float] = {}
    start, num_run = time.monotonic(), 0
    while stage := [trial for spec in specs for trial in search.next_trials(study, spec, losses)]:
        tasks = [trials.Task(study, trial) for trial in (shard_of(stage, shard) if is_grid else stage)]
        for task in tasks:
            trials.check_asked(task, trials.read_outcome(task))
        missing = [task for task in tasks if not trials.is_finished(task)]
        print(f"{len(tasks)} trials, {len(tasks) - len(missing)} of them done before", flush=True)
        for number, (task, outcome) in enumerate(runner(missing), start=1):
            num_run += 1
            seconds_left = (time.monotonic() - start) / num_run * (len(missing) - number)
            print(
                f"[{number}/{len(missing)}] {task.trial.spec_name}: {task.trial.label}: {outcome_text(outcome)}; "
                f"{seconds_left:,.0f} s left",
                flush=True,
            )
        losses |= {trial.key: results.choosing_loss(study, trial) for trial in stage}


def outcome_text(outcome: dict[str, Any]) -> str:
    """Return a finished trial's outcome in a few words."""
    if "failed" in outcome:
        return f"failed ({outcome['failed'][:100]})"
    losses = f"held-out loss {outcome['final_eval_loss']:.4f} (base {outcome['base_eval_loss']:.4f})"
    return f"{losses}, {outcome['wall_seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
