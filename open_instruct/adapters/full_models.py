"""Full models beside a base and its adapters in one evaluation: each is loaded alone, and asked the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from open_instruct.adapters.folders import BASE
from open_instruct.errors import InputError


def parse_models(words: Sequence[str] | None, taken: Sequence[str]) -> dict[str, str]:
    """Return the folders or repositories of `--model NAME=DIR`, by name.

    Args:
        words: as given.
        taken: names of the adapters.

    Raises:
        InputError: a word is not NAME=DIR, or a name is used twice.
    """
    models: dict[str, str] = {}
    for word in words or []:
        name, separator, source = word.partition("=")
        if not separator or not source or not re.fullmatch(r"[\w.-]+", name):
            raise InputError(f"--model {word}: give NAME=DIR, as --model full=output/full")
        if name == BASE or name in taken or name in models:
            raise InputError(f"--model {word}: another model is named {name!r}: give another name")
        if source.startswith((".", "/", "~")) and not Path(source).is_dir():
            raise InputError(f"--model {word}: no such folder")
        models[name] = source
    return models


def check_same_tokens(name: str, own: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> None:
    """Refuse a loss per token where a model's answers are other tokens than the base's.

    Args:
        name: the model.
        own: labelled tokens of each row, of the model.
        wanted: the same of the base.

    Raises:
        InputError: they differ.
    """
    if list(map(list, own)) != list(map(list, wanted)):
        raise InputError(
            f"--model {name} writes answers in other tokens than the base, so losses per token can't be compared: "
            "leave loss out of --metrics, or give one template with --chat_template_name"
        )
