"""Files that a flag names, each as FILE or NAME=FILE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from open_instruct.errors import InputError


def named_file(word: str) -> tuple[str | None, str]:
    """Return name and file of FILE (without a name) or NAME=FILE."""
    name, separator, file = word.partition("=")
    if not separator or Path(word).exists() or "/" in name:
        return None, word
    return name, file


def named_files(words: Sequence[str], flag: str) -> dict[str, str]:
    """Return files by name: the given one, or else that of the file, without its endings.

    Args:
        words: each FILE or NAME=FILE.
        flag: the flag that names them, for errors.

    Raises:
        InputError: a name can't stand in a table, or two files have one name.
    """
    files: dict[str, str] = {}
    for word in words:
        given, file = named_file(word)
        name = re.sub(r"[^\w.-]", "_", Path(file).name.split(".")[0]) or "file" if given is None else given
        if not re.fullmatch(r"[\w.-]{1,60}", name) or not file:
            raise InputError(
                f"{flag} {word}: give NAME=FILE, where NAME is letters, digits, points, dashes, underscores"
            )
        if name in files:
            raise InputError(
                f"{flag}: two files are named {name!r} ({files[name]} and {file}): give names, {flag} NAME={file}"
            )
        files[name] = file
    return files
