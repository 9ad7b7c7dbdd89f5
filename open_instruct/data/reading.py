"""Files, folders and Hub data sets → rows, one at a time, each with its source ("train.jsonl:17"); → conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from open_instruct.data import forms, lines, shards
from open_instruct.data.kinds import file_kind, is_json, is_table, open_bytes
from open_instruct.errors import InputError, one_line

Row = tuple[str, dict[str, Any]]
"""(source, columns): the source names where the row stands, for error messages."""


def files_of(source: str, split: str = "train", configuration: str | None = None) -> list[Path]:
    """Return the files that hold the rows of a source, in order.

    Args:
        source: a file; a glob; a folder of JSON or table files, or one that `Dataset.save_to_disk` wrote; or the name
            of a data set on the Hub, which is downloaded where it is not in the cache of `datasets`.
        split: the split to take, where the source has several.
        configuration: the configuration of a data set on the Hub; None: its only one.

    Raises:
        InputError: nothing is there, a shard is missing, or a configuration is given for a file or folder.
    """
    path = Path(source).expanduser()
    if path.is_file() or (is_json(path) and not any(mark in source for mark in "*?[")):
        file_kind(path)  # refuses what can't be data
        files = [path]
    elif path.is_dir() and not shards.is_saved_dataset(path):
        files = sorted((p for p in path.iterdir() if is_json(p)), key=shards.natural)
        shards.check_sequence(files)
    else:
        files = []
    if not files:
        return shards.source_files(source, split, configuration)
    if configuration:
        raise InputError(shards.no_configuration(source, configuration))
    return files


def read_files(paths: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of files of any known kind, one file after another.

    Raises:
        InputError: a file is missing, empty, a Git LFS pointer, not UTF-8, malformed, or of another kind.
    """
    for path in paths:
        yield from read_rows(path)


def read_rows(path: Path) -> Iterator[Row]:
    """Return the rows of one file; the file is checked at once, the rows are read one at a time.

    Raises:
        InputError: as `read_files`.
    """
    kind = file_kind(path)
    if is_table(path, kind):
        return read_table(path)
    if not is_json(path):
        raise InputError(
            f"{path} ends in {path.suffix or 'nothing'}: "
            "conversations must be .jsonl, .json, .arrow, .feather or .parquet"
        )
    return read_json_array(path) if kind == "json array" else read_json_lines(path)


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yield one row a line; blank lines are left out."""
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(iter(file.readline, b""), start=1):
                text = line.strip()
                if text:
                    yield parse_line(f"{path}:{number}", text)
        except OSError as error:
            raise InputError(f"{path} can't be read ({one_line(error, 200)}): fetch or compress it again") from None


def parse_line(source: str, line: bytes) -> Row:
    """Parse one JSON object.

    Raises:
        InputError: text that is not UTF-8, malformed JSON, or another JSON value than an object.
    """
    try:
        return source, as_row(source, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{source}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source}: malformed JSON ({error.msg} at column {error.colno}): one object a line is needed"
        ) from None


def read_json_array(path: Path) -> Iterator[Row]:
    """Yield the members of one JSON array, one at a time."""
    for number, row in enumerate(lines.array_rows(path), start=1):
        source = f"{path} row {number}"
        yield source, as_row(source, row)


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow, Feather or Parquet file; a record batch is held at a time."""
    number = 0
    for batch in shards.open_shard(path).batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def as_row(source: str, value: Any) -> dict[str, Any]:
    """Return the value of a row, or raise an InputError if it is no JSON object."""
    if not isinstance(value, dict):
        raise InputError(f"{source}: a row is a {type(value).__name__}: it must be an object with `messages`")
    return value


def read_mixture(members: list[tuple[str, str]], splits: list[str], seed: int) -> Iterator[Row]:
    """Yield the rows of several sources one after another, each read twice, to count and to choose, and none held.

    Args:
        members: (file, folder or data set, amount) pairs. An amount with a point is a share of the rows (1.0: all), one
            without is a number of rows, as in open-instruct.
        splits: one split for each member, or one for all.
        seed: decides which rows are drawn where an amount is less than all.

    Raises:
        InputError: the splits don't fit the members, or an amount does not fit its source.
    """
    if len(splits) not in (1, len(members)):
        raise InputError(f"{len(splits)} splits for {len(members)} data sets: give one for each, or one for all")
    for index, (name, amount) in enumerate(members):
        files = files_of(name, splits[index if len(splits) > 1 else 0])
        if amount == "1.0":
            yield from read_files(files)
            continue
        num_rows = sum(1 for _ in read_files(files))
        count = mixture_count(name, amount, num_rows)
        chosen = set(random.Random(seed).sample(range(num_rows), count))
        yield from (row for number, row in enumerate(read_files(files)) if number in chosen)


def mixture_count(name: str, amount: str, num_rows: int) -> int:
    """Return how many of `num_rows` rows an amount of a mixture means: "0.5" is a share, "2000" a number.

    Raises:
        InputError: the amount is no number, or there are not so many rows.
    """
    try:
        count = round(float(amount) * num_rows) if "." in amount else int(amount)
    except ValueError:
        raise InputError(f"amount {amount!r} of {name} is not a number: give rows (2000) or a share (0.5)") from None
    if not 0 < count <= num_rows:
        raise InputError(f"amount {amount} of {name} asks for {count} rows: it has {num_rows}")
    return count


def conversations(rows: Iterable[Row], key: str = "messages") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each row's source and checked messages; `key` is the column of the messages."""
    for source, row in rows:
        yield source, forms.to_messages(source, row, key)
