r"""Measure a base model and adapters on it, on a file or with the EleutherAI harness; or measure existing answers.

    python open_instruct/evaluate_peft.py --adapter output/run --file heldout.jsonl --output_dir output/run-evaluated
    python open_instruct/evaluate_peft.py --adapter a=output/a --adapter b=output/b --file gsm8k.jsonl \
        --answer_regex "#### (.*)" --normaliser number
    python open_instruct/evaluate_peft.py --adapter output/run --lm_eval_tasks hellaswag arc_easy
    python open_instruct/evaluate_peft.py --answers answers.jsonl --file references.jsonl --pass_at 1 5

On files, every figure has a bootstrapped 95 % interval, and so has each adapter's difference from the base, or the
difference of two models' answers, on the same rows. With --answers no model is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import folders
from open_instruct.adapters.answer_flags import add_answer_flags, wrong_mode
from open_instruct.adapters.answer_metrics import METRICS, NORMALISERS, check_regex, chosen_rows
from open_instruct.adapters.full_models import parse_models
from open_instruct.adapters.named_files import named_file, named_files
from open_instruct.adapters.question_forms import FORM_FLAGS, add_form_flags
from open_instruct.adapters.similarity import check_similarity_model
from open_instruct.command_line import OneLineArgumentParser, add_engine_flag, add_model_flags, at_least, seed
from open_instruct.data import reading
from open_instruct.data.plain_text import is_text_file
from open_instruct.errors import InputError, exit_code, visible
from open_instruct.files import check_path, write_text
from open_instruct.flags.data import BAD_ROWS
from open_instruct.interrupts import ending_at_once
from open_instruct.report.result_files import check_result_folder, result_folder, write_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: done; 2: wrong input, reported in one line; 130: interrupted."""
    with ExitStack() as held:
        return exit_code(lambda: run(parse(argv), held))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = OneLineArgumentParser(
        ("answer_regex", "system"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser, dtype="auto")
    add_engine_flag(parser)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="NAME=DIR",
        help="full model, measured beside base and adapters; loaded alone; can be repeated",
    )
    add(
        "--file",
        action="append",
        metavar="[NAME=]FILE",
        help="questions with answers, in any form that training reads; several are measured one by one and together",
    )
    add("--system", metavar="TEXT", help="system message for every conversation that has none")
    add(
        "--other_text",
        metavar="FILE",
        help="plain text that was not trained for, on which every model's loss is measured as well: a file whose lines "
        "are passages, or rows with a column `text`",
    )
    add("--bad_rows", choices=["error", "skip"], default="error", help=BAD_ROWS)
    add(
        "--metrics",
        nargs="+",
        choices=[*METRICS, "none"],
        help="figures to compute; none: only those of --metric and --similarity_model (default: all, without loss for "
        "--answers)",
    )
    add(
        "--similarity_model",
        metavar="DIR",
        help="model of sentence-transformers, by which answers and references are compared, too: cosine of embeddings",
    )
    add(
        "--answer_regex",
        help="regular expression whose last match's first group is the part of an answer that counts, as '#### (.*)'",
    )
    add(
        "--normaliser",
        choices=NORMALISERS,
        default="none",
        help="how answers are simplified before exact match (default: none)",
    )
    add(
        "--context",
        metavar="FILE",
        help="text before each conversation; the base is measured behind it, too, and each model's distance from that",
    )
    add("--max_samples", type=at_least(1), help="number of rows of each file, drawn by seed; unset: all")
    add("--max_new_tokens", type=at_least(1), default=256, help="largest number of tokens of an answer (default: 256)")
    add("--batch_size", type=at_least(1, 10**6), default=16, help="largest number of rows at once (default: 16)")
    add("--seed", type=seed, default=42, help="seed of the choice of rows and of the bootstrap (default: 42)")
    add("--chat_template_name", help="as in finetune_peft.py; unset: the adapter's own")
    add(
        "--output_dir",
        metavar="DIR",
        help="folder for evaluation.json, evaluation.md and evaluation.png; unset: the text is only printed",
    )
    add("--lm_eval_tasks", nargs="+", metavar="TASK", help="tasks of the harness, instead of --file")
    add(
        "--lm_eval_path",
        metavar="DIR",
        help="folder with further tasks of the harness, for machines without a network",
    )
    add("--limit", type=at_least(1), help="number of documents of each harness task; unset: all")
    add("--apply_chat_template", action="store_true", help="put harness questions into the chat template")
    add_form_flags(parser)
    add_answer_flags(parser)
    args = parser.parse_args(argv)
    if problem := wrong_mode(parser, args):
        parser.error(problem)
    if bool(args.file) == bool(args.lm_eval_tasks) and not (args.answers or args.blind_results):
        parser.error("give one of --file, --lm_eval_tasks and --answers")
    if args.lm_eval_tasks and args.engine != "transformers":
        parser.error("--engine belongs to --file: drop it for --lm_eval_tasks")
    if args.lm_eval_tasks and any(getattr(args, name) is not None for name in FORM_FLAGS):
        parser.error("--columns, --template, --shots and --shots_file belong to --file: drop them for --lm_eval_tasks")
    if args.model and (args.lm_eval_tasks or args.context or args.engine != "transformers"):
        parser.error("--model goes with --file and transformers alone: drop --lm_eval_tasks, --context and --engine")
    if args.lm_eval_tasks and (args.context or args.system or args.other_text or args.similarity_model):
        parser.error(
            "--context, --system, --other_text and --similarity_model belong to --file: drop them for --lm_eval_tasks"
        )
    if args.answers and args.file and (len(args.file) > 1 or named_file(args.file[0])[0]):
        parser.error("--answers takes one --file of references, without a name: give one")
    if args.answer_regex:
        check_regex(args.answer_regex)
    if args.metrics is None:
        args.metrics = [name for name in METRICS if name != "loss" or not args.answers]
    args.metrics = [name for name in args.metrics if name != "none"]
    return args


def run(args: argparse.Namespace, held: ExitStack) -> None:
    """Check, measure, print, write."""
    if args.similarity_model:
        check_similarity_model(args.similarity_model)
    if args.blind_sheet:
        write_blind_sheet(args)
        return
    if args.answers or args.blind_results:
        score_answers(args, held)
        return
    adapters = folders.parse_adapters(args.adapter)
    folders.base_name(args.model_name_or_path, adapters, args.any_base)
    parse_models(args.model, [folder.name for folder in adapters])
    for source in [*named_files(args.file or [], "--file").values(), *([args.other_text] if args.other_text else [])]:
        if source != args.other_text or not is_text_file(source):
            reading.files_of(source)
    check_result_folder(args.output_dir, "evaluation")

    with ending_at_once():  # they import torch and matplotlib: only now that the arguments are checked
        from open_instruct.adapters import evaluation, harness, served
        from open_instruct.report import evaluation as report

    held.enter_context(result_folder(args.output_dir, "evaluation"))
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "any_base": args.any_base,
        "trust_remote_code": args.trust_remote_code,
        "chat_template_name": args.chat_template_name,
        "allow_pickle": args.allow_pickle,
        "engine": args.engine,
    }
    if args.lm_eval_tasks:
        manager = harness.load_tasks(args.lm_eval_tasks, args.lm_eval_path)
        models = served.load(args.adapter, args.model_name_or_path, **options)
        harness.check_hard_prompts(served=models)
        result = harness.run_tasks(
            models, args.lm_eval_tasks, manager, args.limit, args.batch_size, args.apply_chat_template
        )
    else:
        result = evaluation.evaluate(
            args.file,
            args.adapter,
            args.model_name_or_path,
            args.metrics,
            args.answer_regex,
            args.normaliser,
            args.max_samples,
            args.max_new_tokens,
            args.batch_size,
            args.seed,
            args.bad_rows,
            args.context,
            args.model,
            args.columns,
            args.template,
            args.shots,
            args.shots_file,
            args.system,
            args.other_text,
            args.similarity_model,
            **options,
        )
    text = report.markdown(result)
    try:  # first the files: what was computed is not lost where nobody reads the output
        write_result(args.output_dir, "evaluation", text, report.plot, result)
    finally:
        print(visible(text))


def write_blind_sheet(args: argparse.Namespace) -> None:
    """Write the page of a blind comparison."""
    path = Path(args.blind_sheet)
    check_path(path.parent, f"--blind_sheet {path}")
    if os.path.lexists(path) or path.suffix not in (".html", ".htm"):
        raise InputError(f"--blind_sheet {path} exists, or does not end in .html: name another file")
    with ending_at_once():
        from open_instruct.adapters.answer_files import read_answers
        from open_instruct.adapters.blind_results import blind_sheet

    rows = read_answers(args.answers, bad_rows=args.bad_rows)
    rows = [rows[i] for i in chosen_rows(len(rows), args.max_samples, args.seed)]
    page = blind_sheet(rows, args.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    print(visible(f"{len(rows)} questions: open {path} in a browser, then count with --blind_results"))


def score_answers(args: argparse.Namespace, held: ExitStack) -> None:
    """Measure answers that exist already, or count blind comparisons of them; print, write."""
    check_result_folder(args.output_dir, "evaluation")
    with ending_at_once():  # reading rows imports pyarrow
        from open_instruct.adapters.answer_evaluation import evaluate_answers
        from open_instruct.adapters.blind_results import count_results
        from open_instruct.report import answers as report
        from open_instruct.report.blind import blind_tables

    held.enter_context(result_folder(args.output_dir, "evaluation"))
    if args.blind_results:
        result = count_results(args.blind_results, args.seed)
        text = blind_tables(result)
    else:
        result = evaluate_answers(
            args.answers,
            args.file[0] if args.file else None,
            args.metrics,
            args.answer_regex,
            args.normaliser,
            args.several,
            args.pass_at,
            args.metric,
            args.stemmer,
            args.max_samples,
            args.seed,
            args.bad_rows,
            args.similarity_model,
        )
        text = report.markdown(result)
    try:  # first the files: what was computed is not lost where nobody reads the output
        write_result(args.output_dir, "evaluation", text, report.plot, result)
    finally:
        print(visible(text))


if __name__ == "__main__":
    sys.exit(main())
