"""Merge a LoRA adapter into its base, with the flags of open-instruct's tool of this name.

    python open_instruct/merge_lora.py --base_model_name_or_path MODEL --lora_model_name_or_path output/run \
        --output_dir output/run-merged --save_tokenizer

`merge_peft.py` does the work: any method that it knows can be merged, the base is dequantised where the adapter was
trained on a quantised one, and the result is reloaded and compared before it is kept. The tokenizer is always saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import open_instruct.interrupts
import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import folders
from open_instruct.command_line import OneLineArgumentParser, add_model_flags, parse
from open_instruct.errors import InputError, exit_code
from open_instruct.interrupts import ending_at_once
from open_instruct.merge_peft import summary


def build_parser() -> OneLineArgumentParser:
    """Make the parser: open-instruct's flags, and those that all tools of this project share."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lora_model_name_or_path", dest="adapter", action="append", metavar="DIR", help="the trained adapter"
    )
    parser.add_argument(
        "--base_model_name_or_path", dest="model_name_or_path", metavar="MODEL", help="its base; unset: as it names it"
    )
    add_model_flags(parser)
    parser.add_argument(
        "--output_dir", metavar="DIR", help="the merged model; must not exist (default: ADAPTER_merged)"
    )
    parser.add_argument("--config_file", metavar="YAML", help="the training's configuration: names base and adapter")
    parser.add_argument("--qlora", action="store_true", help="the adapter was trained on the base in 4 bits")
    parser.add_argument("--tokenizer_name_or_path", metavar="NAME", help="tokenizer to save, if not the adapter's")
    parser.add_argument("--push_to_hub", action="store_true", help="upload the merged model, private")
    for name in ("--save_tokenizer", "--use_fast_tokenizer"):
        parser.add_argument(name, action="store_true", help="accepted: always so")
    for name in ("--pad_to_multiple_of", "--seed"):
        parser.add_argument(name, type=int, metavar="N", help="accepted, without effect: no token is added or drawn")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: merged and verified; 2: wrong input, named in one line; 130: interrupted."""
    args = build_parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Check, merge, and print a summary."""
    repository = None
    if args.config_file:
        flags, _ = parse([args.config_file])
        args.model_name_or_path = args.model_name_or_path or flags.model_name_or_path
        args.adapter = args.adapter or [flags.output_dir]
        args.qlora = args.qlora or flags.use_qlora
        repository = flags.hf_repo_id and "/".join(filter(None, [flags.hf_entity, flags.hf_repo_id]))
    if not args.adapter or len(args.adapter) > 1:
        raise InputError("name one adapter: --lora_model_name_or_path DIR")
    output = Path(args.output_dir or f"{args.adapter[0].rstrip('/')}_merged")
    adapters = folders.parse_adapters(args.adapter)
    folders.check_mergeable(adapters, str(output))
    base = folders.base_name(args.model_name_or_path, adapters, args.any_base)
    stated = "4bit" if args.qlora else None
    folders.quantisation(adapters, stated)

    with ending_at_once():
        from open_instruct.adapters import merging  # imports torch: only now that the arguments are checked
        from open_instruct.model import loading

    tokenizer = None
    if args.tokenizer_name_or_path:
        tokenizer = loading.load_tokenizer(args.tokenizer_name_or_path, trust_remote_code=args.trust_remote_code)
        config = loading.load_config(base, trust_remote_code=args.trust_remote_code).get_text_config()
        highest = max(tokenizer.get_vocab().values())
        if highest >= config.vocab_size:
            raise InputError(
                f"--tokenizer_name_or_path {args.tokenizer_name_or_path} has ids up to {highest}, and the base embeds "
                f"{config.vocab_size} tokens: give the tokenizer of the adapter's training, or leave it out"
            )
    result = merging.merge(
        args.adapter,
        str(output),
        args.model_name_or_path,
        args.dtype,
        args.any_base,
        trust_remote_code=args.trust_remote_code,
        allow_pickle=args.allow_pickle,
        quantised_in_training=stated,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    print(summary(result, str(output)))
    if args.push_to_hub:
        from open_instruct.training.output import upload

        upload(output, repository or output.name, None)


if __name__ == "__main__":
    sys.exit(main())
