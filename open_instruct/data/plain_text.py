"""Plain text, on which forgetting is measured: a file of which each line is a passage, or rows with a column `text`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from open_instruct.data import forms, reading
from open_instruct.data.kinds import TABLE_SUFFIXES, is_json
from open_instruct.data.texts import kind_of
from open_instruct.errors import InputError, input_faults
from open_instruct.small_files import must_be_file

COLUMN = "text"


def is_text_file(source: str) -> bool:
    """Return whether a source is a file whose lines are passages: one that is neither JSON nor a table."""
    path = Path(source).expanduser()
    return path.is_file() and not is_json(path) and path.suffix not in TABLE_SUFFIXES


def has_passages(source: str) -> bool:
    """Return whether a source is plain text: it has lines, or its first row has a column `text` and no conversation.

    Raises:
        InputError: it can't be read.
    """
    if is_text_file(source):
        return True
    for row_source, row in islice(reading.read_files(reading.files_of(source)), 1):
        try:
            forms.form_of(row_source, row)
        except InputError:
            return COLUMN in row
    return False


def passages(source: str, what: str) -> Iterator[str]:
    """Yield the passages of a plain text, without those that are white space.

    Args:
        source: a text file in UTF-8, or rows in any file, folder or data set that training reads.
        what: the source as the user knows it.

    Raises:
        InputError: it can't be read, is not UTF-8, or a row has no text.
    """
    if is_text_file(source):
        path = Path(source).expanduser()
        with input_faults(what, "give a text in UTF-8"):
            must_be_file(path)
            with path.open(encoding="utf-8-sig") as file:
                for line in file:
                    if line.strip():
                        yield line.rstrip("\n")
        return
    for row_source, row in reading.read_files(reading.files_of(source)):
        if COLUMN not in row:
            raise InputError(
                f"{row_source}: {what} needs plain text, and the row has no column `{COLUMN}`: give a text file, or "
                "rows with that column"
            )
        text = row[COLUMN]
        if not isinstance(text, str):
            raise InputError(f"{row_source}: `{COLUMN}` is {kind_of(text)}: give it text, or remove the row")
        if text.strip():
            yield text
