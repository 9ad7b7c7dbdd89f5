"""Text on which a study measures forgetting: plain text, or conversations, of which the answers count."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from open_instruct.data import plain_text, reading
from open_instruct.errors import InputError

MAX_ROWS = 200


def is_plain(path: Path) -> bool:
    """Whether a file holds plain text."""
    return plain_text.has_passages(str(path))


def first_passages(path: Path) -> list[str]:
    """Return the first passages of a plain text.

    Raises:
        InputError: it can't be read, or is not UTF-8.
    """
    return list(islice(plain_text.passages(str(path), f"report.other_text {path}"), MAX_ROWS))


def other_conversations(path: Path) -> Any:
    """Return the conversations of a file, unread."""
    return reading.conversations(reading.read_files(reading.files_of(str(path))), "messages")


def check_other_text(path: Path, is_encoder_decoder: bool) -> None:
    """Read the beginning of a text, so that a wrong one is said before the first trial.

    Args:
        path: the text.
        is_encoder_decoder: the study's base is an encoder–decoder.

    Raises:
        InputError: it can't be used, or is empty.
    """
    if not is_plain(path):
        rows: list[Any] = list(islice(other_conversations(path), MAX_ROWS))
    elif is_encoder_decoder:
        raise InputError(
            f"report.other_text {path} is plain text, and an encoder–decoder predicts answers only: give conversations"
        )
    else:
        rows = first_passages(path)
    if not rows:
        raise InputError(f"report.other_text {path} holds no text: name another, or remove it")
