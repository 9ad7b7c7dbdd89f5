"""Rows of a JSON file by number, without holding the file: a newline index, and copies of the chosen lines."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from open_instruct.errors import InputError

CHUNK_BYTES = 1 << 24
TAIL_BYTES = 300  # of a row, in which its last column is looked for first
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
SEPARATORS = re.compile(r"[\s,]*")


def open_bytes(path: Path) -> BinaryIO:
    """A file for reading bytes; .gz and .zst are decompressed on the way."""
    if path.suffix not in COMPRESSION:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSION[path.suffix]))


def index_lines(path: Path, column: str | None = None) -> tuple[np.ndarray, list[str] | None, str]:
    """One pass over a JSON Lines file.

    Args:
        path: of the file.
        column: a column whose value is wanted for every row.

    Returns:
        Byte offsets of the rows, [N, 2] start and end (without the line break; blank lines are left out); the column's
        values as text, or None; sha256 of the file.
    """
    digest, queue = hashlib.sha256(), Queue(maxsize=4)  # type: ignore[var-annotated]

    def hash_chunks() -> None:
        while (data := queue.get()) is not None:
            digest.update(data)

    hasher = Thread(target=hash_chunks, daemon=True)
    hasher.start()
    bounds: list[int] = []  # start and end of each row, in turn
    values: list[str] | None = [] if column else None
    known: dict[str, str] = {}  # equal values share one string: a million rows have a few sources

    def keep(data: bytes, start: int, end: int, position: int) -> None:
        if not data[start : min(end, start + 64)].strip() and not data[start:end].strip():
            return
        bounds.append(position + start)
        bounds.append(position + end)
        if values is not None and column is not None:
            value = value_of(data[max(start, end - TAIL_BYTES) : end], column)
            value = value if value is not None else whole_value(data[start:end], column, path, len(values))
            values.append(known.setdefault(value, value))

    rest, position = b"", 0  # a line that the next chunk goes on with; the offset of the chunk's first byte
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            queue.put(chunk)
            start, end = 0, chunk.find(b"\n")
            if rest and end >= 0:  # only this line is copied, not the whole chunk
                keep(rest + chunk[:end], 0, len(rest) + end, position - len(rest))
                rest, start, end = b"", end + 1, chunk.find(b"\n", end + 1)
            while end >= 0:
                keep(chunk, start, end, position)
                start, end = end + 1, chunk.find(b"\n", end + 1)
            rest += chunk[start:]
            position += len(chunk)
    queue.put(None)
    keep(rest, 0, len(rest), position - len(rest))
    hasher.join()
    return np.array(bounds, np.int64).reshape(-1, 2), values, digest.hexdigest()


def value_of(tail: bytes, column: str) -> str | None:
    """A text column's value from the end of a row, where the column is the row's last; None where that can't be told.

    What follows the value is only the closing brace, so it can't belong to an inner object.
    """
    key = b'"' + column.encode() + b'"'
    at = tail.rfind(key)
    after = tail[at + len(key) :].strip() if at >= 0 else b""
    if after.startswith(b":") and after.endswith(b'"}') and after.count(b'"') == 2 and b"\\" not in after:
        return after[1:-2].strip()[1:].decode("utf-8", "replace")
    return None


def whole_value(line: bytes, column: str, path: Path, index: int) -> str:
    """A column's value in a row, as text, by parsing the row.

    Raises:
        InputError: the row is malformed or has no such column.
    """
    place = f"{path} row {index + 1}"
    try:
        value = json.loads(line)[column]
    except KeyError:
        raise InputError(f"{place} has no column {column}: name one that every row has") from None
    except (ValueError, TypeError) as error:
        raise InputError(f"{place} is malformed JSON ({error}): one object a line is needed") from None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def lines_at(path: Path, spans: np.ndarray, indices: Sequence[int] | np.ndarray) -> Iterator[bytes]:
    """The chosen lines, each with its line break, in the order of `indices`."""
    with path.open("rb", buffering=0) as file:
        for index in indices:
            start, end = spans[index]
            file.seek(int(start))
            yield file.read(int(end - start)).rstrip(b"\r") + b"\n"


def array_rows(path: Path) -> Iterator[bytes]:
    """The members of a JSON array as compact lines, parsed one at a time from a sliding window of the file.

    Raises:
        InputError: malformed JSON or text that is not UTF-8, with the byte at which the bad row begins.
    """
    decoder = json.JSONDecoder()
    window, number, at_end = "", 0, False
    pending = b""
    with path.open("rb") as file:

        def more() -> bool:
            nonlocal window, pending, at_end
            data = file.read(CHUNK_BYTES)
            at_end = not data
            try:
                text, pending = decode_prefix(pending + data, at_end)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: not UTF-8 after row {number} ({error.reason}): convert the file to UTF-8"
                ) from None
            window += text
            return not at_end

        more()
        cursor = skip_to_value(window, 0)
        if window[cursor : cursor + 1] != "[":
            raise InputError(f"{path} holds no JSON array")
        cursor += 1
        while True:
            while (cursor := skip_to_value(window, cursor)) == len(window) and more():
                pass
            if window[cursor : cursor + 1] == "]":
                return
            try:
                row, cursor = decoder.raw_decode(window, cursor)
            except json.JSONDecodeError as error:
                # A row that the window cuts fails at its end, or in a string that is still open; any other mistake is final.
                cut = error.pos > len(window) - 16 or error.msg.startswith("Unterminated string")
                if cut and not at_end and more():
                    continue
                raise InputError(f"{path}: malformed JSON in row {number + 1} ({error.msg})") from None
            number += 1
            yield json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            if cursor > CHUNK_BYTES:
                window, cursor = window[cursor:], 0


def skip_to_value(text: str, position: int) -> int:
    """The next position that holds neither white space nor a comma."""
    match = SEPARATORS.match(text, position)
    return match.end() if match else position


def decode_prefix(data: bytes, final: bool) -> tuple[str, bytes]:
    """The longest prefix that ends on a character border, decoded, and the up to three bytes left over."""
    try:
        return data.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        if not final and error.start >= len(data) - 3 and error.end == len(data):
            return data[: error.start].decode("utf-8"), data[error.start :]
        raise
