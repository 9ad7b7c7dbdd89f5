"""Full models beside a base and its adapters in one evaluation: each is loaded alone, and asked the same."""

from __future__ import annotations

import json
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
        if stood_behind_hard_prompt(source):
            raise InputError(
                f"--model {word}: it was trained behind a hard prompt, which is put before adapters' questions only: "
                "train an adapter behind it, or put the text into the questions and give answers with --answers"
            )
        models[name] = source
    return models


def stood_behind_hard_prompt(source: str) -> bool:
    """Return whether the run.json beside a full model names a hard prompt; another tool's does not."""
    path = Path(source, "run.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("hard_prompt") is not None
