"""Look inside a soft prompt: neighbours in the vocabulary, norms, similarities, drift in training, attention by layer.

    python open_instruct/inspect_peft.py --adapter output/run --file heldout.jsonl --output_dir output/run-inspected

Numbers only: that a virtual token stands near a word does not say that it means the word.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import folders
from open_instruct.adapters.question_forms import FORM_FLAGS, add_form_flags
from open_instruct.command_line import OneLineArgumentParser, add_model_flags, at_least
from open_instruct.data import reading
from open_instruct.errors import InputError, exit_code, visible
from open_instruct.interrupts import ending_at_once
from open_instruct.report.result_files import check_result_folder, result_folder, write_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: done; 2: wrong input, reported in one line; 130: interrupted."""
    with ExitStack() as held:
        return exit_code(lambda: run(parse(argv), held))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, dtype="auto")
    parser.add_argument(
        "--file", metavar="FILE", help="questions on which attention is measured; unset: no measurement"
    )
    parser.add_argument("--rows", type=at_least(1), default=16, help="number of rows taken from the file (default: 16)")
    parser.add_argument(
        "--neighbours", type=at_least(1), default=3, help="number of nearest tokens of each virtual token (default: 3)"
    )
    parser.add_argument(
        "--top",
        type=at_least(1),
        metavar="N",
        help="print only the N virtual tokens that moved furthest, or are longest where no start is kept; unset: all",
    )
    add_form_flags(parser)
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder for inspection.json, inspection.md and inspection.png; unset: the text is only printed",
    )
    args = parser.parse_args(argv)
    if not args.file and any(getattr(args, name) is not None for name in FORM_FLAGS):
        parser.error("--columns, --template, --shots and --shots_file are for rows of --file: give that, or drop them")
    return args


def run(args: argparse.Namespace, held: ExitStack) -> None:
    """Check, inspect, print, write."""
    if not args.adapter or len(args.adapter) > 1:
        raise InputError("give the adapter to inspect with --adapter DIR")
    adapters = folders.parse_adapters(args.adapter)
    folders.check_prompt(adapters[0])
    if args.top and adapters[0].prompt_kind != "embeddings":
        raise InputError(f"--top {args.top} has no effect: {adapters[0].title} has no tokens of its own; drop it")
    folders.base_name(args.model_name_or_path, adapters, args.any_base)
    if args.file:
        reading.files_of(args.file)
    check_result_folder(args.output_dir, "inspection")

    with ending_at_once():  # they import torch and matplotlib: only now that the arguments are checked
        from open_instruct.adapters import inspection
        from open_instruct.report import inspection as report

    held.enter_context(result_folder(args.output_dir, "inspection"))
    result = inspection.inspect(
        args.adapter[0],
        args.model_name_or_path,
        args.file,
        args.rows,
        args.neighbours,
        args.columns,
        args.template,
        args.shots,
        args.shots_file,
        dtype=args.dtype,
        any_base=args.any_base,
        trust_remote_code=args.trust_remote_code,
        allow_pickle=args.allow_pickle,
    )
    text = report.markdown(result, args.top)
    try:  # first the files: what was computed is not lost where nobody reads the output
        write_result(args.output_dir, "inspection", text, report.plot, result)
    finally:
        print(visible(text))


if __name__ == "__main__":
    sys.exit(main())
