"""Values of data, as they may stand in a message: short, on one line, harmless to a terminal."""

from __future__ import annotations

import reprlib
from typing import Any

LONGEST = 80  # characters


def shown(value: object) -> str:
    """Return a value as Python writes it, cut at 80 characters and a few levels; control characters are escapes."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = LONGEST
    return abridged(writer.repr(value))


def plain(text: str) -> str:
    """Return a text without quotes, cut at 80 characters; control characters and half surrogates are escapes."""
    return abridged("".join(char if char.isprintable() else repr(char)[1:-1] for char in text[: LONGEST + 1]))


def abridged(text: str) -> str:
    """Return a text of at most 80 characters."""
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def kind_of(value: Any) -> str:
    """Return what a value is, in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
