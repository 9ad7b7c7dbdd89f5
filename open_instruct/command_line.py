"""Parse the command line and a YAML file into flags, with the origin of every given value."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from open_instruct.errors import InputError, one_line, warn
from open_instruct.flags import ALIASES, FIELDS, GROUPS, AcceptedFlags, Flags
from open_instruct.flags.declare import MAX_INT, unusable_text
from open_instruct.flags.optimization import MAX_SEED
from open_instruct.small_files import read_yaml

TRUE, FALSE = ("true", "yes", "1", "t", "y"), ("false", "no", "0", "f", "n")


class OneLineArgumentParser(argparse.ArgumentParser):
    """An argparse parser with one-line errors, no abbreviations, and no texts that nothing could be named by."""

    def __init__(self, several_lines: Sequence[str] = (), **options: Any) -> None:
        """Pass the options on to argparse; `several_lines` names arguments that may have line breaks."""
        super().__init__(allow_abbrev=False, **options)
        self.several_lines = several_lines

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse texts that are empty, hold a null character or a line break, or are not UTF-8."""
        values = super().parse_args(args, namespace)
        for name, value in vars(values).items():
            if reason := unusable_text(value, name in self.several_lines):
                self.error(f"{name if name in ('file', 'sources') else f'--{name}'} {reason}")
        return values

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # argparse drops "--" from a flag's values, and gives a flag of one value an empty list.
        if action.option_strings and "--" in arg_strings:
            raise argparse.ArgumentError(action, "-- is no value")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        print(f"error: {one_line(message, 2000)} (see --help)", file=sys.stderr)
        sys.exit(2)


def add_model_flags(parser: argparse.ArgumentParser, dtype: str = "stored") -> None:
    """Add the flags that name a base model and adapters, shared by every tool that uses them."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="[NAME=]DIR",
        help="trained adapter in PEFT's format; can be repeated",
    )
    parser.add_argument("--model_name_or_path", metavar="MODEL", help="base model; unset: the one named by the adapter")
    parser.add_argument(
        "--any_base", action="store_true", help="accept a base whose name differs from that in the adapter"
    )
    choices = ["stored", "auto", "float32", "bfloat16", "float16"]
    text = "precision of the base. stored: as in its files; auto: bfloat16 on a GPU that supports it, float32 elsewhere"
    parser.add_argument("--dtype", default=dtype, choices=choices, help=f"{text} (default: {dtype})")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="load a base whose weights exist only as pickle files"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def add_engine_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses what computes answers."""
    text = "what computes answers: transformers, or vLLM, which must be installed (default: transformers)"
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help=text)


def at_least(smallest: int, largest: int = MAX_INT) -> Callable[[str], int]:
    """Return an argparse type for integers from `smallest` to `largest`."""

    def integer(text: str) -> int:
        digits = text.removeprefix("-")
        is_integer = digits.isascii() and digits.isdigit() and len(digits) < 20
        if not is_integer or not smallest <= int(text) <= largest:
            most = f" and at most {largest}" if largest < MAX_INT else ""
            raise argparse.ArgumentTypeError(f"{text[:80]} is not a whole number of at least {smallest}{most}")
        return int(text)

    return integer


seed = at_least(0, MAX_SEED)


def number_from(smallest: float, largest: float) -> Callable[[str], float]:
    """Return an argparse type for numbers from `smallest` to `largest`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not smallest <= value <= largest:
            raise argparse.ArgumentTypeError(f"{text[:80]} is not a number from {smallest:g} to {largest:g}")
        return value

    return number


def boolean(text: str) -> bool:
    """Parse a truth value as an argparse type."""
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def build_parser() -> OneLineArgumentParser:
    """Make a parser with one group of options for each class of flags."""
    parser = OneLineArgumentParser(
        usage="%(prog)s [CONFIG.yaml] [--flag value …]",
        description="Fine-tune a causal language model on conversations. Flags override the values of CONFIG.yaml.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for group in GROUPS:
        title = (group.__doc__ or "").split(". ")[0].split(":")[0].split("\n")[0].rstrip(".")
        section, types = parser.add_argument_group(title), get_type_hints(group)
        for item in fields(group):
            add_flag(section, item, types[item.name])
    return parser


def add_flag(section: Any, item: Field[Any], kind: Any) -> None:
    """Add one flag. Its spelling with dashes also works, but is left out of the help.

    A truth value needs no argument. One that is true by default has a `--no_` form as well.
    """
    if NoneType in get_args(kind):  # X | None
        kind = next(member for member in get_args(kind) if member is not NoneType)
    default: Any = item.default if item.default_factory is MISSING else item.default_factory()
    also = "".join(f"; also --{alias}" for alias in item.metadata["aliases"])
    options: dict[str, Any] = {"help": item.metadata["description"].replace("%", "%%") + also, "default": default}
    is_list = get_origin(kind) is list
    kind = get_args(kind)[0] if is_list else kind
    if get_origin(kind) is Literal:
        options |= {"choices": get_args(kind), "type": str.lower}  # PEFT writes TEXT where this project writes text
        options |= {"nargs": "+"} if is_list else {}
    elif is_list:
        options |= {"type": kind, "nargs": "+", "metavar": "TEXT"}
    elif kind is bool:
        options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        options |= {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, "TEXT")}
        if item.metadata["optional_value"] is not None:
            options |= {"nargs": "?", "const": item.metadata["optional_value"]}
    section.add_argument(f"--{item.name}", **options)
    hidden = {"dest": item.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    dashed = item.name.replace("_", "-")
    if dashed != item.name:
        section.add_argument(f"--{dashed}", **{**options, **hidden})
    if default is True:
        negations = dict.fromkeys([f"--no_{item.name}", f"--no-{item.name}", f"--no-{dashed}"])
        section.add_argument(*negations, action="store_false", **hidden)


def parse(argv: Sequence[str]) -> tuple[Flags, dict[str, str]]:
    """Parse `[CONFIG.yaml] --flag value …`.

    Returns:
        The flags, and for each given flag its origin: `flag` or `config`.

    Raises:
        InputError: the configuration file can't be read, or is no mapping; or a flag has two values under two names.
        SystemExit: with code 2 on a wrong flag or configuration key, 0 after `--help`.
    """
    argv = list(argv)
    from_config: list[str] = []
    if argv and not argv[0].startswith("-"):
        from_config = read_config(Path(argv.pop(0)))
    elif argv and argv[0] == "--config" and len(argv) > 1:
        from_config, argv = read_config(Path(argv[1])), argv[2:]
    from_config, argv = without_alias_names(from_config), without_alias_names(argv)
    parser = build_parser()
    namespace, unknown = parser.parse_known_args([*from_config, *argv])
    if unknown:
        parser.error(describe_unknown(unknown))
    values = {name: getattr(namespace, name) for name in FIELDS}
    origins = dict.fromkeys(flags_in(from_config), "config") | dict.fromkeys(flags_in(argv), "flag")
    if values["save_to_hub"] and "push_to_hub" in origins and not values["push_to_hub"]:
        parser.error("--save_to_hub asks for an upload, and --push_to_hub False forbids it: drop one")
    return Flags(**without_aliases(values)), origins


def without_alias_names(words: Sequence[str]) -> list[str]:
    """Return command-line words with each flag under its own name.

    Raises:
        InputError: a flag has one value under its name and another one under an alias.
    """
    renamed: list[str] = []
    values: dict[str, dict[str, list[str]]] = {}  # of each flag, by the name that was given
    current: list[str] = []
    for word in words:
        if not word.startswith("--"):
            renamed.append(word)
            current.append(word)
            continue
        given, equals, value = word[2:].partition("=")
        given = given.replace("-", "_")
        name = ALIASES.get(given, given)
        renamed.append(f"--{name}{equals}{value}" if name != given else word)
        current = [value] if equals else []
        values.setdefault(name, {})[given] = current
    for name, by_name in values.items():
        if len(by_name) > 1 and len({" ".join(given_words) for given_words in by_name.values()}) > 1:
            both = " and ".join(f"--{given} {' '.join(given_words)}"[:100] for given, given_words in by_name.items())
            raise InputError(f"{both} are two names of one flag, with different values: give --{name} alone")
    return renamed


def without_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """Give older names, and zero values that mean "unset", their present form."""
    return values | {
        "tokenizer_name_or_path": values["tokenizer_name_or_path"] or values["tokenizer_name"],
        "num_virtual_tokens": values["num_virtual_tokens"] or None,
        "push_to_hub": values["push_to_hub"] or bool(values["save_to_hub"]),
        "hf_repo_id": values["hf_repo_id"] or values["save_to_hub"],
    }


def read_config(path: Path) -> list[str]:
    """Read the YAML (or JSON) mapping of a file as command-line words, so that both go through the same checks."""
    words: list[str] = []
    for name, value in read_yaml(path, f"configuration {path}").items():
        try:
            words += flag_words(name, value)
        except InputError as error:
            raise InputError(f"configuration {path}: {error}") from None
    return words


def flag_words(name: str, value: Any) -> list[str]:
    """Return a key of a YAML file and its value as command-line words; none where the value is null.

    Raises:
        InputError: there is no such flag, or it can't have such a value.
    """
    (known,) = flags_in([f"--{name}"])
    if known not in FIELDS or not name.replace("-", "_").removeprefix("no_").isidentifier():
        raise InputError(describe_unknown([f"--{name}"]))
    if isinstance(value, dict) and FIELDS[known].metadata["form"] != "json":
        raise InputError(f"{name} has a mapping, which only flags of JSON take: give a value")
    if name.replace("-", "_") != known and value is True:  # a negated flag takes no value
        return [f"--{name}"]
    return [] if value is None else [f"--{name}", *config_words(value)]


def config_words(value: Any) -> list[str]:
    """Return one YAML value as command-line words.

    Raises:
        InputError: a text would be read as another flag, or a list holds what is no value.
    """
    if isinstance(value, str) and value.startswith("--"):
        raise InputError(f"the value {value!r} of a configuration looks like a flag: give the flag a line of its own")
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list):
        if any(item is None or isinstance(item, (dict, list)) for item in value):
            raise InputError(f"the list {str(value)[:80]} of a configuration must hold texts and numbers only")
        return [word for item in value for word in config_words(item)]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def flags_in(words: Sequence[str]) -> list[str]:
    """Return the names of the flags that a list of command-line words sets."""
    names = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    names = [ALIASES.get(name, name) for name in names]
    return [name if name in FIELDS else name.removeprefix("no_") for name in names]


def warn_of_lost_lists(words: Sequence[str]) -> None:
    """Warn of a flag with several values that is given twice: as everywhere, the last one counts, not both."""
    given = flags_in(words)
    for name in dict.fromkeys(given):
        if given.count(name) > 1 and name in FIELDS and "list[" in str(FIELDS[name].type):
            warn(f"--{name} is given {given.count(name)} times, and only the last counts: put all values after one")


def describe_unknown(unknown: Sequence[str]) -> str:
    """Return a message that names the unknown words, and the nearest flag for each that looks like a flag."""
    parts = []
    for word in unknown:
        name = word.lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, FIELDS, n=1) if word.startswith("-") else []
        parts.append(f"unknown {word}" + (f", did you mean --{near[0]}?" if near else ""))
    return "; ".join(parts)


def warn_without_effect(flags: Flags, origins: dict[str, str]) -> None:
    """Name on one line the flags that were given but do nothing here, each with its reason."""
    reasons = {item.name: item.metadata["description"] for item in fields(AcceptedFlags)}
    for name, item in FIELDS.items():
        needed = item.metadata["warns_without"]
        if needed and not getattr(flags, needed) and getattr(flags, name) != ["none"]:
            reasons[name] = f"--{needed} is not set"
    given = [name for name in origins if name in reasons]
    if given:
        warn("without effect here: " + "; ".join(f"--{name} ({reasons[name]})" for name in given))
