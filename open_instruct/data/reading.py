"""Files, folders and Hub data sets → rows with their places ("train.jsonl:17"), one at a time; rows → conversations."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from open_instruct.data import forms, lines, shards
from open_instruct.errors import InputError

LFS_HEADER = b"version https://git-lfs"
Row = tuple[str, dict[str, Any]]


def is_json(path: Path) -> bool:
    """Whether a name ends like JSON, compressed or not."""
    name = path.with_suffix("") if path.suffix in lines.COMPRESSION else path
    return name.suffix in (".jsonl", ".json")


def files_of(source: str, split: str = "train") -> list[Path]:
    """The files that a source names: itself, a glob's, or the shards of a folder or of a data set on the Hub."""
    path = Path(source).expanduser()
    if path.is_file() or (is_json(path) and not any(mark in source for mark in "*?[")):
        check_file(path)
        return [path]
    if path.is_dir():
        found = sorted((p for p in path.iterdir() if is_json(p)), key=shards.natural)
        if found:
            shards.check_sequence(found)
            return found
    return shards.source_files(source, split)


def read_files(paths: Sequence[Path]) -> Iterator[Row]:
    """The rows of files of any known kind, one file after another.

    Raises:
        InputError: a file is missing, empty, a Git LFS pointer, not UTF-8, malformed, or of another kind.
    """
    for path in paths:
        yield from read_rows(path)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file."""
    check_file(path)
    if not is_json(path):
        if path.suffix not in shards.SUFFIXES:
            raise InputError(
                f"{path} ends in {path.suffix or 'nothing'}: conversations must be .jsonl, .json, .arrow, .feather or .parquet"
            )
        return read_table(path)
    if path.suffix not in lines.COMPRESSION:
        with path.open("rb") as file:
            if file.read(256).lstrip().startswith(b"["):
                return read_json_array(path)
    return read_json_lines(path)


def check_file(path: Path) -> None:
    """Refuse what can't be data before anything is read."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.json*"))[:5] if path.parent.is_dir() else []
        raise InputError(f"no such file: {path}" + (f" (its folder has {', '.join(near)})" if near else ""))
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    with path.open("rb") as file:
        head = file.read(len(LFS_HEADER))
    if not head:
        raise InputError(f"{path} is empty: it holds no conversation")
    if head == LFS_HEADER:
        raise InputError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")


def read_json_lines(path: Path) -> Iterator[Row]:
    """One row a line; blank lines are passed over."""
    with lines.open_bytes(path) as file:
        try:
            for number, line in enumerate(iter(file.readline, b""), start=1):
                text = line.strip()
                if text:
                    yield from parse_line(f"{path}:{number}", text)
        except OSError as error:
            raise InputError(f"{path} can't be read ({error}): fetch or compress it again") from None


def parse_line(place: str, line: bytes) -> Iterator[Row]:
    """One JSON object."""
    try:
        yield place, as_row(place, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place}: malformed JSON ({error.msg} at column {error.colno}): one object a line is needed"
        ) from None


def read_json_array(path: Path) -> Iterator[Row]:
    """The members of one JSON array, one at a time."""
    for number, line in enumerate(lines.array_rows(path), start=1):
        place = f"{path} row {number}"
        yield place, as_row(place, json.loads(line))


def read_table(path: Path) -> Iterator[Row]:
    """The rows of an Arrow, Feather or Parquet file, a record batch at a time."""
    number = 0
    for batch in shards.open_shard(path).batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def as_row(place: str, value: Any) -> dict[str, Any]:
    """A row must be an object."""
    if not isinstance(value, dict):
        raise InputError(f"{place}: a row is a {type(value).__name__}: it must be an object with `messages`")
    return value


def read_hub_rows(name: str, configuration: str | None, split: str) -> Iterator[Row]:
    """The rows of a data set on the Hub or of a local folder that `datasets` can load."""
    import datasets

    try:
        rows = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # `datasets` and the Hub raise dozens of types; each means that the name can't be loaded
        raise InputError(
            f"data set {name} can't be loaded ({shards.one_line(error)}): check the name, or give a file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{name} row {number}", row


def read_mixture(members: list[tuple[str, str]], splits: list[str], seed: int) -> Iterator[Row]:
    """Rows of several sources one after another. A source is read twice, to count and to choose, and never held.

    Args:
        members: (file, folder or data set, amount) pairs. An amount with a point is a share of the rows (1.0: all), one
            without is a number of rows, as in open-instruct.
        splits: one split for each member, or one for all.
        seed: of the draw of rows where an amount is less than all.
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
    """How many rows an amount of a mixture means: "0.5" is a share, "2000" a number."""
    try:
        count = round(float(amount) * num_rows) if "." in amount else int(amount)
    except ValueError:
        raise InputError(f"amount {amount!r} of {name} is not a number: give rows (2000) or a share (0.5)") from None
    if not 0 < count <= num_rows:
        raise InputError(f"amount {amount} of {name} asks for {count} rows: it has {num_rows}")
    return count


def conversations(rows: Iterable[Row], key: str = "messages") -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each row's place and checked messages."""
    for place, row in rows:
        yield place, forms.to_messages(place, row, key)
