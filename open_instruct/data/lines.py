"""Rows of big JSON files, without holding the file: an index of lines, copies of chosen lines, members of an array."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, BinaryIO

import numpy as np

from open_instruct.data.kinds import BYTE_ORDER_MARK, open_bytes
from open_instruct.data.texts import kind_of, shown
from open_instruct.errors import InputError, input_faults

CHUNK_BYTES = 1 << 24
ARRAY_CHUNK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28  # a few hundred bytes of .gz can hold a line that fills the memory; no conversation is so long
TAIL_BYTES = 300  # at the end of a row, in which its last column is looked for before the row is parsed
OPEN, CLOSE = b"{}"
WHITE_SPACE = re.compile(r"[ \t\n\r]*")
TOKEN_LENGTH = 16  # characters: more than any of JSON's words and escapes has


def index_lines(path: Path, column: str | None = None) -> tuple[np.ndarray, list[str] | None, str]:
    """Find the rows of a JSON Lines file in one pass.

    Args:
        path: the file to index.
        column: a column whose value is wanted for every row.

    Returns:
        Byte offsets of the rows, [N, 2] start and end (without the line break; blank lines are left out); the column's
        values as text, or None; sha256 of the file.

    Raises:
        InputError: a row is no JSON object, by its first and last byte, or does not have the wanted column.
    """
    # sha256 releases the interpreter's lock, so a thread hashes one chunk while the next is searched for line breaks.
    digest, queue = hashlib.sha256(), Queue(maxsize=4)  # type: ignore[var-annotated]

    def hash_chunks() -> None:
        while (data := queue.get()) is not None:
            digest.update(data)

    hasher = Thread(target=hash_chunks, daemon=True)
    hasher.start()
    bounds: list[int] = []  # start and end of each row, in turn
    values: list[str] | None = [] if column else None
    known: dict[str, str] = {}  # equal values share one string: a million rows have a few sources

    def add_row(data: bytes, start: int, end: int, offset: int) -> None:
        """Note the line data[start:end]; `offset` is where `data` begins in the file."""
        if offset + start == 0 and data.startswith(BYTE_ORDER_MARK):
            start += len(BYTE_ORDER_MARK)
        # Only a line whose first bytes are white space may be blank: the others are not copied to find out.
        if not data[start : min(end, start + 64)].strip() and not data[start:end].strip():
            return
        if not (data[start] == OPEN and data[end - 1] == CLOSE):  # else white space stands there, or it is no object
            check_braces(data[start:end], path, len(bounds) // 2)
        bounds.append(offset + start)
        bounds.append(offset + end)
        if values is not None and column is not None:
            value = last_value(data[max(start, end - TAIL_BYTES) : end], column)
            value = value if value is not None else column_text(data[start:end], column, path, len(values))
            values.append(known.setdefault(value, value))

    # A chunk holds the end of a line that began before it, complete lines, and the beginning of a line. `rest` is what
    # the earlier chunks held of the first; `offset` is where the chunk begins in the file.
    rest, offset = b"", 0
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size  # a file that grows meanwhile ends here
        while chunk := file.read(min(CHUNK_BYTES, size - offset)):
            queue.put(chunk)
            start, end = 0, chunk.find(b"\n")
            if rest and end >= 0:  # joining `rest` to this line alone: joining it to the chunk would copy 16 MB
                add_row(rest + chunk[:end], 0, len(rest) + end, offset - len(rest))
                rest, start, end = b"", end + 1, chunk.find(b"\n", end + 1)
            while end >= 0:
                add_row(chunk, start, end, offset)
                start, end = end + 1, chunk.find(b"\n", end + 1)
            rest += chunk[start:]  # no line break in this chunk: the line continues in the next
            offset += len(chunk)
            if len(rest) > MAX_ROW_BYTES:
                raise too_long(f"{path} row {len(bounds) // 2 + 1}")
    queue.put(None)
    add_row(rest, 0, len(rest), offset - len(rest))  # the last line may lack its line break
    hasher.join()
    return np.array(bounds, np.int64).reshape(-1, 2), values, digest.hexdigest()


def check_braces(line: bytes, path: Path, index: int) -> None:
    """Raise an InputError if a line does not begin and end like a JSON object."""
    text = line.strip()
    if not (text.startswith(b"{") and text.endswith(b"}")):
        start = shown(text[:40].decode("utf-8", "replace"))
        raise InputError(
            f"{path} row {index + 1} is malformed JSON, or no object ({start}): one object a line is needed"
        )


def too_long(source: str) -> InputError:
    """Return the error for a row that no memory should be spent on."""
    return InputError(f"{source} is longer than {MAX_ROW_BYTES >> 20} MB: it is no conversation; one a line is needed")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, whose keys must differ: Python would keep the last of two without a word.

    Raises:
        ValueError: a key stands there twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} stands there twice")
    return made


def parse_line(source: str, line: bytes) -> dict[str, Any]:
    """Parse one line.

    Args:
        source: where the line stands, for errors.
        line: the line.

    Raises:
        InputError: text that is not UTF-8, malformed JSON, or another JSON value than an object with unique keys.
    """
    with input_faults(source, "one JSON object a line is needed"):
        try:
            value = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"{source}: malformed JSON ({error.msg} at column {error.colno}): one object a line is needed"
            ) from None
    return as_row(source, value)


def as_row(source: str, value: Any) -> dict[str, Any]:
    """Return the value of a row, or raise an InputError if it is no JSON object."""
    if not isinstance(value, dict):
        raise InputError(f"{source} is {kind_of(value)}: a row must be a JSON object")
    return value


def last_value(tail: bytes, column: str) -> str | None:
    """Return a text column's value from the end of a row without parsing it, where the column is the row's last.

    What follows the value is only the closing brace, so it can't belong to an inner object. None means that the row
    must be parsed: the column stands elsewhere, is no text, or has an escape.
    """
    key = b'"' + column.encode() + b'"'
    at = tail.rfind(key)
    after = tail[at + len(key) :].strip() if at >= 0 else b""
    if after.startswith(b":") and after.endswith(b'"}') and after.count(b'"') == 2 and b"\\" not in after:
        try:
            return after[1:-2].strip()[1:].decode("utf-8")
        except UnicodeDecodeError:
            return None
    return None


def column_text(line: bytes, column: str, path: Path, index: int) -> str:
    """Return a column's value in a row, as text, by parsing the row.

    Args:
        line: the row, as JSON.
        column: name of the column.
        path: the row's file, for errors.
        index: the row's number in it, from 0, for errors.

    Raises:
        InputError: the row is malformed or has no such column.
    """
    return text_of(parse_line(f"{path} row {index + 1}", line), column, path, index)


def text_of(row: Any, column: str, path: Path, index: int) -> str:
    """Return a column's value in a parsed row as text: itself, or its JSON.

    Raises:
        InputError: the row is no object, or has no such column.
    """
    source = f"{path} row {index + 1}"
    if column not in as_row(source, row):
        raise InputError(f"{source} has no column {column}: name one that every row has")
    return row[column] if isinstance(row[column], str) else json.dumps(row[column], ensure_ascii=False)


def lines_at(path: Path, spans: np.ndarray, indices: Sequence[int] | np.ndarray) -> Iterator[bytes]:
    """Yield the chosen lines, each with its line break, in the order of `indices`."""
    with path.open("rb", buffering=0) as file:
        for index in indices:
            start, end = spans[index]
            file.seek(int(start))
            yield file.read(int(end - start)).rstrip(b"\r") + b"\n"


def array_rows(path: Path) -> Iterator[Any]:
    """Yield the members of a JSON array one at a time, as `json.loads` would give them.

    Raises:
        InputError: no array, malformed JSON, or text that is not UTF-8, with the number of the bad row.
    """
    with open_bytes(path) as file:
        text = ArrayText(file, path)
        for number in itertools.count(1):
            with input_faults(f"{path} row {number}", "fix the file there"), array_faults(path, number):
                if not text.has_row(first=number == 1):
                    return
                row = text.row()
            yield row


@contextmanager
def array_faults(path: Path, number: int) -> Iterator[None]:
    """Say where in a JSON array text is malformed."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: malformed JSON in row {number} ({error.msg}): fix the file there") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 in row {number}: convert the file to UTF-8") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}: half of a surrogate pair in row {number}: fix the file there") from None


def no_number(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise json.JSONDecodeError(f"{name} is not JSON", "", 0)


class ArrayText:
    """The text of a JSON array, of which no more is held than the chunks in which the current row stands."""

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=no_number)

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Begin before the bracket."""
        self.path = path
        self.file = file
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()  # leaves out a byte order mark
        self.fault: UnicodeDecodeError | None = None  # at the end of `text`
        self.text, self.at, self.ended = "", 0, False  # read but not used is text[at:]

    def has_row(self, first: bool) -> bool:
        """Skip what stands before a row: the bracket or a comma. Return False at the end of the array.

        Raises:
            InputError: there is no bracket.
            JSONDecodeError: something else stands there, or after the end.
        """
        found = self.next_character()
        if first:
            if found != "[":
                raise InputError(f"{self.path} holds no JSON array")
            self.at += 1
            found = self.next_character()
            if found != "]":
                return True
        if found == "]":
            self.at += 1
            if self.next_character():
                raise json.JSONDecodeError("text follows after the end of the array", self.text, self.at)
            return False
        if found != ",":
            reason = "a comma is missing before it" if found else "the file ends within the array"
            raise json.JSONDecodeError(reason, self.text, self.at)
        self.at += 1
        return True

    def next_character(self) -> str:
        """Skip white space, and return the next character without using it; "" at the end."""
        while True:
            self.at = WHITE_SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.read():
                return self.text[self.at : self.at + 1]

    def row(self) -> Any:
        """Return the row that begins here.

        Raises:
            JSONDecodeError: it is malformed.
            UnicodeEncodeError: it holds half of a surrogate pair, which Python reads and no file can hold.
        """
        self.next_character()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # More text can mend only what is wrong at the end: a string that does not close, half of a word.
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - TOKEN_LENGTH
                if not is_cut or not self.read():
                    raise
                continue
            # What is no object may be the beginning of a number that goes on in the next chunk, as 1 is of 1e+5.
            if isinstance(value, dict) or end < len(self.text) - 2 or not self.read():
                break
        if any(self.text.find(escape, self.at, end) >= 0 for escape in ("\\ud", "\\uD")):
            json.dumps(value, ensure_ascii=False).encode()
        self.at = end
        return value

    def read(self) -> bool:
        """Read as much as is waiting already, so that a long row is not parsed too often. Return False at the end.

        Raises:
            UnicodeDecodeError: what follows is not UTF-8.
            InputError: the row is too long.
        """
        if self.fault:
            raise self.fault
        waiting = self.text[self.at :]
        parts, size = [waiting], 0
        while size <= len(waiting) and not self.ended and not self.fault:
            chunk = self.file.read(ARRAY_CHUNK_BYTES)
            self.ended = not chunk
            try:
                part = self.utf8.decode(chunk, final=self.ended)
            except UnicodeDecodeError as error:
                part, self.fault = error.object[: error.start].decode("utf-8"), error
            parts.append(part)
            size += len(part)
        if len(waiting) + size > MAX_ROW_BYTES:
            raise too_long(f"{self.path}: a row")
        if size:
            self.text, self.at = "".join(parts), 0
        elif self.fault:
            raise self.fault
        return size > 0
