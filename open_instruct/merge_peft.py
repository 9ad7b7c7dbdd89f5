"""Make a plain checkpoint of base + adapter, with no PEFT left in it, that engines can serve.

    python open_instruct/merge_peft.py --adapter output/run --output output/run-merged
    python open_instruct/merge_peft.py --adapter a=output/run-a --adapter b=output/run-b --output output/both

LoRA, VeRA and IA3 are merged into the weights. Soft prompts become tokens, which the chat template writes before the
input; one checkpoint can hold several of them. Prompt tuning and P-tuning work in any engine. The tokens of prefix
tuning stand for keys and values, which only a server started by scripts/serve.sh has. The result is reloaded and
compared with base + adapter before it is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import folders
from open_instruct.command_line import OneLineArgumentParser, add_model_flags
from open_instruct.errors import exit_code
from open_instruct.interrupts import ending_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: merged and verified; 2: wrong input, named in one line; 130: interrupted."""
    return exit_code(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the plain checkpoint; must not exist")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Check, merge, and print a summary."""
    adapters = folders.parse_adapters(args.adapter)
    folders.check_mergeable(adapters, args.output)
    folders.base_name(args.model_name_or_path, adapters, args.any_base)

    with ending_at_once():
        from open_instruct.adapters import merging  # imports torch: only now that the arguments are checked

    options = {"trust_remote_code": args.trust_remote_code, "allow_pickle": args.allow_pickle}
    result = merging.merge(args.adapter, args.output, args.model_name_or_path, args.dtype, args.any_base, **options)
    print(summary(result, args.output))


def summary(result: dict[str, Any], output: str) -> str:
    """Return in words what was merged, how well it agrees, and how to use it."""
    lines = [
        f"{output}: {', '.join(result['adapters'])} on {result['base']}, {result['dtype']}, "
        f"{result['vocabulary_rows']:,} vocabulary rows",
        f"reloaded and compared: logits differ by at most {result['largest_difference']:.1e} of the largest, "
        f"{result['equal_texts']} of {result['texts']} greedy texts are equal",
    ]
    for name, tokens in result["tokens"].items():
        choice = f'chat_template_kwargs={{"adapter": "{name}"}}' if len(result["tokens"]) > 1 else "always"
        last = tokens["first"] + tokens["number"] - 1
        server = "; served by scripts/serve.sh" if tokens["kind"] == "keys_values" else ""
        how = f"put first by the {result['written_by']} ({choice}){server}"
        lines.append(f"  {name}: tokens {tokens['first']} to {last}, {how}")
    if result["tokens"]:
        lines.append(
            f"  new tokens take {result['leaked_probability']:.0e} of the probability at most, "
            "and generation_config suppresses them"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
