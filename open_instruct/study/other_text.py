"""Text on which forgetting is measured: plain text, of which each line is a passage, or conversations."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from open_instruct.data import reading
from open_instruct.errors import InputError, input_faults

MAX_ROWS = 200


def is_plain(path: Path) -> bool:
    """Whether a file holds plain text."""
    return path.suffix == ".txt"


def passages(path: Path) -> list[str]:
    """Return the first passages of a plain text.

    Raises:
        InputError: it can't be read, or is not UTF-8.
    """
    with input_faults(f"report.other_text {path}", "give a text in UTF-8"):
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:MAX_ROWS]


def other_conversations(path: Path) -> Any:
    """Return the conversations of a file, unread."""
    return reading.conversations(reading.read_files(reading.files_of(str(path))), "messages")


def check_text(path: Path) -> None:
    """Read the beginning of a text, so that a wrong one is said before the first trial.

    Raises:
        InputError: it can't be used, or is empty.
    """
    rows = passages(path) if is_plain(path) else list(islice(other_conversations(path), MAX_ROWS))
    if not rows:
        raise InputError(f"report.other_text {path} holds no text: name another, or remove it")
