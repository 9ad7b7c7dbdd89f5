"""Rows of big JSON files, without holding the file: an index of lines, copies of chosen lines, members of an array."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any, BinaryIO

import ijson
import numpy as np

from open_instruct.data.kinds import BYTE_ORDER_MARK, open_bytes
from open_instruct.data.texts import kind_of, shown
from open_instruct.errors import InputError, input_faults, one_line

CHUNK_BYTES = 1 << 24
ARRAY_CHUNK_BYTES = 1 << 20  # smaller: ijson makes all rows of a chunk before it gives the first
MAX_ROW_BYTES = 1 << 28  # a few hundred bytes of .gz can hold a line that fills the memory; no conversation is so long
TAIL_BYTES = 300  # at the end of a row, in which its last column is looked for before the row is parsed
# The first half of a surrogate pair, written as an escape, that the second half does not follow. An even number of
# backslashes stands before it, else its own would be escaped. `.{6}`: a chunk that ends too early gives no match.
HALF_PAIR = re.compile(rb"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])(?=.{6})", re.DOTALL)
NOT_TEXT = r"not UTF-8, or half of a surrogate pair (\ud800 to \udfff),"
OPEN, CLOSE = b"{}"
PAIR_BYTES = 12  # of a surrogate pair written as two escapes


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
        # Only a line whose first bytes are white space may be blank: the others are not copied to find out.
        if not data[start : min(end, start + 64)].strip() and not data[start:end].strip():
            return
        if offset + start == 0 and data.startswith(BYTE_ORDER_MARK):
            start += len(BYTE_ORDER_MARK)
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
        raise ValueError(doubled(next(key for key in keys if keys.count(key) > 1)))
    return made


def doubled(key: str) -> str:
    """Return the error message for an object that has a key twice."""
    return f"the key {shown(key)} stands there twice"


class JsonObject(dict[str, Any]):
    """A JSON object as ijson makes it, key after key. ijson crashes if a method raises, so a doubled key is noted."""

    __slots__ = ("doubled",)

    def __init__(self) -> None:
        """Begin without keys."""
        super().__init__()
        self.doubled: str | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        """Add a key."""
        if key in self:
            self.doubled = key
        super().__setitem__(key, value)


def parse_object(source: str, line: bytes) -> dict[str, Any]:
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
    return text_of(parse_object(f"{path} row {index + 1}", line), column, path, index)


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
    num_rows, sizes = 0, [0]
    with open_bytes(path) as file:
        # Not with `use_float`, which refuses integers beyond 64 bits and numbers like 1e400.
        items = ijson.items(ijson.from_iter(array_chunks(file, path, sizes)), "item", map_type=JsonObject)
        while True:
            source = f"{path} row {num_rows + 1}"
            with input_faults(source, "fix the file there"), array_faults(path, num_rows + 1):
                row = next(items, items)
                if row is items:
                    return
                row = finished(row)
            yield row
            num_rows += 1
            sizes[0] = 0


@contextmanager
def array_faults(path: Path, number: int) -> Iterator[None]:
    """Say better than ijson what is wrong with a row of a JSON array."""
    try:
        yield
    except ijson.JSONError as error:
        (message,) = error.args  # bytes where the text around the mistake, which it quotes, is not UTF-8
        message = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
        reason = one_line(message.split("\n")[0]).removesuffix(".")
        if "UTF8" in reason:
            raise InputError(f"{path}: not UTF-8 in row {number}: convert the file to UTF-8") from None
        raise InputError(f"{path}: malformed JSON in row {number} ({reason}): fix the file there") from None
    except UnicodeDecodeError:  # yajl checks less than Python
        raise InputError(f"{path}: {NOT_TEXT} in row {number}: fix the file there") from None
    except InvalidOperation:  # of Decimal
        raise InputError(f"{path}: a number in row {number} is out of range: fix the file there") from None


def array_chunks(file: BinaryIO, path: Path, sizes: list[int]) -> Iterator[bytes]:
    r"""Yield the bytes of a file for ijson, with two checks that its parser, yajl, leaves out.

    yajl writes "?" for the first half of a surrogate pair (`\ud800`) that the second does not follow, which would
    change the data without a word. And of the file `{"item": 1}` ijson would give 1, as if it were the array `[1]`.

    Args:
        file: the file.
        path: its name, for errors.
        sizes: bytes since the last row; the reader of the rows sets them to 0.

    Raises:
        InputError: the file holds no array, half of a surrogate pair, or a row that is too long.
    """
    started = False
    unchecked, offset = b"", 0  # the end of the last chunk, in which an escape may be cut; where it begins in the file
    while True:
        chunk = file.read(ARRAY_CHUNK_BYTES if started else max(ARRAY_CHUNK_BYTES, len(BYTE_ORDER_MARK)))
        chunk, started = chunk if started else chunk.removeprefix(BYTE_ORDER_MARK), True
        sizes[0] += len(chunk)
        if sizes[0] > MAX_ROW_BYTES:
            raise too_long(f"{path}: a row")
        data = unchecked + (chunk or b" " * PAIR_BYTES)
        if offset == 0 and not data.lstrip().startswith(b"["):
            raise InputError(f"{path} holds no JSON array")
        if (b"\\ud" in data or b"\\uD" in data) and (match := HALF_PAIR.search(data)):
            raise InputError(f"{path}: {NOT_TEXT} near byte {offset + match.end() - 6:,}: fix the file there")
        if not chunk:
            return
        yield chunk
        cut = max(len(data) - PAIR_BYTES, 0)
        while cut > 0 and data[cut - 1] == ord("\\"):  # never between a backslash and what it escapes
            cut -= 1
        unchecked, offset = data[cut:], offset + cut


def finished(value: Any) -> Any:
    """Return a value of ijson as `json.loads` gives it: floats in place of Decimals, dicts in place of JsonObjects.

    Raises:
        ValueError: an object has a key twice.
    """
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [finished(inner) if isinstance(inner, COMPOSED) else inner for inner in value]
    if isinstance(value, JsonObject):
        if value.doubled is not None:
            raise ValueError(doubled(value.doubled))
        return {key: finished(inner) if isinstance(inner, COMPOSED) else inner for key, inner in value.items()}
    return value


COMPOSED = (Decimal, list, JsonObject)
