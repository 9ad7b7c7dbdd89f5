"""Write a prefix of a merged checkpoint as a prompt cache of mlx-lm.

    python open_instruct/serving/mlx_cache.py --checkpoint output/both --adapter sum --output sum.safetensors

In Python, mlx-lm answers with it as `docs/serving.md` shows. The cache stands for the prefix's tokens, so the chat
template must write none: "base" is the adapter that does so.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file, from a clone that need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from open_instruct.command_line import OneLineArgumentParser
from open_instruct.errors import InputError, exit_code
from open_instruct.files import check_output, replacing_by_name
from open_instruct.serving.checkpoint import read_prefixes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0: written; 2: wrong input, named in one line."""
    return exit_code(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="what merge_peft.py made")
    parser.add_argument("--adapter", required=True, metavar="NAME", help="the prefix, by the name it was merged with")
    parser.add_argument("--output", required=True, metavar="FILE", help="the prompt cache: FILE.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Check, and write."""
    path, checkpoint = Path(args.output), Path(args.checkpoint)
    check_output(path, [], args.overwrite)
    if path.suffix != ".safetensors":
        raise InputError(f"--output {path} is no name for a prompt cache: name a file that ends in .safetensors")
    try:
        prefixes = {prefix.adapter: prefix for prefix in read_prefixes(checkpoint)}
        if args.adapter not in prefixes:
            there = ", ".join(prefixes) or "none"
            raise InputError(f"--adapter {args.adapter} is no prefix in {checkpoint}: there are {there}")
        prefixes[args.adapter].load()  # to check it; mlx reads the file by itself
    except ValueError as error:
        raise InputError(str(error)) from None
    if importlib.util.find_spec("mlx_lm") is None:
        raise InputError("mlx-lm is not installed: pip install mlx-lm (with mlx[cpu] where there is no Apple GPU)")
    write(prefixes[args.adapter].path, prefixes[args.adapter].num_layers, path)
    print(f"prefix {args.adapter} of {checkpoint} is now the prompt cache {path}")


def write(prefix: Path, num_layers: int, path: Path) -> None:
    """Write the keys and values of a prefix file by mlx-lm itself, which owns the format.

    Args:
        prefix: the file, with `layers.NUMBER.keys` and `.values` [P, K, E].
        num_layers: L.
        path: the prompt cache to write.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, save_prompt_cache

    tensors = mx.load(str(prefix))
    caches = [KVCache() for _ in range(num_layers)]
    for layer, cache in enumerate(caches):
        keys, values = (tensors[f"layers.{layer}.{part}"].transpose(1, 0, 2)[None] for part in ("keys", "values"))
        cache.update_and_fetch(keys, values)  # each [1, K, P, E]
    with replacing_by_name(path) as temporary:
        save_prompt_cache(str(temporary), caches)


if __name__ == "__main__":
    sys.exit(main())
