"""The flags of `evaluate_peft.py --answers`, and which flags go with it."""

from __future__ import annotations

import argparse

from open_instruct.adapters.answer_scores import SEVERAL
from open_instruct.command_line import OneLineArgumentParser, at_least

ONLY_ANSWERS = ("several", "pass_at", "metric", "stemmer", "blind_sheet")
WITH_ANSWERS = (
    *ONLY_ANSWERS,
    *("answers", "file", "bad_rows", "metrics", "answer_regex", "normaliser", "max_samples", "seed", "output_dir"),
    "similarity_model",
)
WITH_SHEET = ("answers", "blind_sheet", "bad_rows", "max_samples", "seed")
WITH_RESULTS = ("blind_results", "seed", "output_dir")


def add_answer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for answers that exist already."""
    add = parser.add_argument_group("answers that exist already (docs/answers.md)").add_argument
    add(
        "--answers",
        action="append",
        metavar="[NAME=]FILE",
        help="answers to measure, as generate_peft.py --output_file writes them; can be repeated; --file then holds "
        "references, where the answers have none",
    )
    add(
        "--several",
        nargs="+",
        choices=SEVERAL,
        help="how several answers to a question are combined: mean of their figures, best one, majority vote, all of "
        "them concatenated (default: mean best vote where there are several)",
    )
    add("--pass_at", nargs="+", type=at_least(1), default=[], metavar="K", help="estimate pass@K from several answers")
    add(
        "--metric",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="figure of your own: FUNCTION(answer, [references]) returns a number; can be repeated; its code is run",
    )
    add("--stemmer", action="store_true", help="ROUGE compares stems of English words")
    add(
        "--blind_sheet",
        metavar="FILE.html",
        help="write a page on which a person compares the models' answers, shuffled by --seed and without names, "
        "instead of measuring",
    )
    add(
        "--blind_results",
        nargs="+",
        metavar="FILE",
        help="count results that were downloaded from such a page, one file for each judge",
    )


def wrong_mode(parser: OneLineArgumentParser, args: argparse.Namespace) -> str | None:
    """Return what is wrong with the flags that belong to --answers, or that do not; None: nothing."""
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    for mode, allowed in (("blind_results", WITH_RESULTS), ("blind_sheet", WITH_SHEET)):
        beside = [f"--{name}" for name in given if name not in allowed]
        if mode in given and beside and (mode == "blind_results" or args.answers):
            return f"{', '.join(beside)}: no effect with --{mode}: drop one of them"
    wrong = [f"--{name}" for name in given if (name not in WITH_ANSWERS if args.answers else name in ONLY_ANSWERS)]
    if wrong and args.answers:
        return f"{', '.join(wrong)}: no effect with --answers, which loads no model: drop that, or --answers"
    if wrong:
        return f"{', '.join(wrong)} belong{'s' * (len(wrong) == 1)} to --answers: answer with generate_peft.py first"
    if "none" in (args.metrics or []) and (len(args.metrics) > 1 or not (args.metric or args.similarity_model)):
        return "--metrics none leaves only the figures of --metric and --similarity_model: give one, and none alone"
    if args.answers and "loss" in (args.metrics or []):
        return "--metrics loss needs a model, and --answers loads none: leave it out"
    if args.stemmer and args.metrics and "rouge" not in args.metrics:
        return "--stemmer has no effect without ROUGE: drop it, or add rouge to --metrics"
    return None
