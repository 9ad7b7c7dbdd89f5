"""Command line and YAML file → typed arguments, with the origin of every value."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from open_instruct.arguments import GROUPS, AcceptedFlags, FinetuneArguments
from open_instruct.errors import InputError


class OneLineParser(HfArgumentParser):
    """Transformers' dataclass parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


class OneLineArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviations."""

    def __init__(self, **options: Any) -> None:
        """As argparse's."""
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)


def add_model_flags(parser: argparse.ArgumentParser, dtype: str = "stored") -> None:
    """The flags that name a base model and adapters, the same for every tool that uses them."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]DIR",
        help="trained adapter, in PEFT's format; may be given several times",
    )
    parser.add_argument(
        "--model_name_or_path", metavar="MODEL", help="base model; unset: the one that the adapter names"
    )
    parser.add_argument("--any_base", action="store_true", help="accept a base under another name than the adapter's")
    choices = ["stored", "auto", "float32", "bfloat16", "float16"]
    text = "precision of the base; stored: as in its files; auto: bfloat16 on a GPU that has it, float32 elsewhere"
    parser.add_argument("--dtype", default=dtype, choices=choices, help=f"{text} (default: {dtype})")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="load a base whose weights exist only as pickle files"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least so much."""

    def whole_number(text: str) -> int:
        if not text.removeprefix("-").isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {smallest}")
        return int(text)

    return whole_number


def build_parser() -> OneLineParser:
    """A parser with one group of options for each dataclass of `arguments.GROUPS`."""
    for group in GROUPS:
        group._argument_group_name = (group.__doc__ or "").split(". ")[0].split(":")[0].rstrip(".")
    return OneLineParser(
        list(GROUPS),
        allow_abbrev=False,
        usage="%(prog)s [CONFIG.yaml] [--flag value …]",
        description="Fine-tune a causal language model on conversations. Flags override the values of CONFIG.yaml.",
    )


def parse(argv: Sequence[str]) -> tuple[FinetuneArguments, dict[str, str]]:
    """Parse `[CONFIG.yaml] --flag value …`.

    Returns:
        The arguments, and for each flag that was given where it came from: `flag` or `config`.

    Raises:
        InputError: unreadable or unknown configuration keys.
        SystemExit: with code 2 on a wrong flag, 0 after `--help`.
    """
    argv = list(argv)
    from_config: list[str] = []
    if argv and not argv[0].startswith("-"):
        from_config = read_config(Path(argv.pop(0)))
    elif argv and argv[0] == "--config" and len(argv) > 1:
        from_config, argv = read_config(Path(argv[1])), argv[2:]
    parser = build_parser()
    names = {field.name for field in fields(FinetuneArguments)}
    namespace, unknown = parser.parse_known_args([*from_config, *argv])
    if unknown:
        parser.error(describe_unknown(unknown, names))
    arguments = FinetuneArguments(**{name: getattr(namespace, name) for name in names})
    origins = dict.fromkeys(flags_in(from_config, names), "config") | dict.fromkeys(flags_in(argv, names), "flag")
    return arguments, origins


def read_config(path: Path) -> list[str]:
    """The YAML (or JSON) mapping of a file as command-line words, so that both go through the same checks."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"configuration {path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"configuration {path} holds a {type(values).__name__}: it must map flag names to values")
    words: list[str] = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *config_words(value)]
    return words


def config_words(value: Any) -> list[str]:
    """One YAML value as command-line words."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        return [word for item in value for word in config_words(item)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def flags_in(words: Sequence[str], names: set[str]) -> list[str]:
    """The flag names that a list of command-line words sets."""
    found = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    return [name if name in names else name.removeprefix("no_") for name in found]


def describe_unknown(unknown: Sequence[str], names: set[str]) -> str:
    """Name the unknown words, with the nearest flag for each that looks like a flag."""
    parts = []
    for word in unknown:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, names, n=1) if word.startswith("-") else []
        parts.append(f"unknown {word}" + (f", did you mean --{near[0]}?" if near else ""))
    return "; ".join(parts)


def warn_without_effect(origins: dict[str, str]) -> None:
    """Name on one line the flags that were given but do nothing here, each with its reason."""
    reasons = {field.name: field.metadata["help"] for field in fields(AcceptedFlags)}
    given = [name for name in origins if name in reasons]
    if given:
        text = "; ".join(f"--{name} ({reasons[name]})" for name in given)
        print(f"warning: without effect here: {text}", file=sys.stderr)
