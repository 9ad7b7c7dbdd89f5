"""Files and Hub data sets → validated conversations, one at a time.

A conversation is a list of messages, each {"role", "content"} with a role of `ROLES`. Every row carries its place
("train.jsonl:17"), so that an error names it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet

from open_instruct.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
LFS_HEADER = b"version https://git-lfs"
Row = tuple[str, dict[str, Any]]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON Lines, JSON-array or Parquet file, with their places.

    Raises:
        InputError: the file is missing, empty, a Git LFS pointer, not UTF-8, malformed, or of another kind.
    """
    check_file(path)
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"{path} ends in {path.suffix or 'nothing'}: training data must be .jsonl, .json or .parquet")
    with path.open("rb") as file:
        is_array = file.read(256).lstrip().startswith(b"[")
    return read_json_array(path) if is_array else read_json_lines(path)


def check_file(path: Path) -> None:
    """Refuse what can't be data before anything is read."""
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.json*"))[:5] if path.parent.is_dir() else []
        raise InputError(f"no such file: {path}" + (f" (its folder has {', '.join(near)})" if near else ""))
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a .jsonl, .json or .parquet file, or load it with --dataset_name")
    with path.open("rb") as file:
        head = file.read(len(LFS_HEADER))
    if not head:
        raise InputError(f"{path} is empty: it holds no conversation")
    if head == LFS_HEADER:
        raise InputError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")


def read_json_lines(path: Path) -> Iterator[Row]:
    """One row a line; blank lines are passed over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8").strip()
                if text:
                    yield place, as_row(place, json.loads(text))
            except UnicodeDecodeError as error:
                raise InputError(f"{place}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8") from None
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: malformed JSON ({error.msg} at column {error.colno}): one object a line is needed") from None


def read_json_array(path: Path) -> Iterator[Row]:
    """The members of one JSON array; the whole file is held in memory."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}): convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: malformed JSON ({error.msg} at column {error.colno})") from None
    for number, row in enumerate(rows, start=1):
        place = f"{path} row {number}"
        yield place, as_row(place, row)


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, a record batch at a time."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}") from None


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
            f"data set {name} can't be loaded ({' '.join(str(error).split())[:300]}): check the name, or give a file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{name} row {number}", row


def read_source(name: str, configuration: str | None = None, split: str = "train") -> Iterator[Row]:
    """A file by its name if it looks like one, else a data set by name."""
    if Path(name).suffix in (".jsonl", ".json", ".parquet") or Path(name).is_file():
        return read_rows(Path(name))
    return read_hub_rows(name, configuration, split)


def read_mixture(members: list[tuple[str, str]], splits: list[str], seed: int) -> Iterator[Row]:
    """Rows of several sources one after another.

    Args:
        members: (file or data set, amount) pairs. An amount with a point is a share of the rows (1.0: all), one without
            is a number of rows, as in open-instruct.
        splits: one split for each member, or one for all.
        seed: of the draw of rows where an amount is less than all.
    """
    if len(splits) not in (1, len(members)):
        raise InputError(f"{len(splits)} splits for {len(members)} data sets: give one for each, or one for all")
    for index, (name, amount) in enumerate(members):
        rows = list(read_source(name, split=splits[index if len(splits) > 1 else 0]))
        count = mixture_count(name, amount, len(rows))
        chosen = range(len(rows)) if count == len(rows) else sorted(random.Random(seed).sample(range(len(rows)), count))
        yield from (rows[i] for i in chosen)


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
    """Check each row's messages.

    Raises:
        InputError: naming the place, the value and the remedy for the first row that is no conversation.
    """
    for place, row in rows:
        messages = row.get(key)
        if messages is None:
            raise InputError(f"{place}: no `{key}` (columns: {', '.join(row) or 'none'}): each row needs {key}: [{{role, content}}, …]")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise InputError(f"{place}: `{key}` must be a list of {{role, content}} objects that is not empty")
        for number, message in enumerate(messages, start=1):
            check_message(f"{place}: message {number}", message)
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise InputError(f"{place}: no assistant message: there is nothing to learn from it; remove the row")
        if next(role for role in roles if role != "system") == "assistant":
            raise InputError(f"{place}: the assistant speaks first: a user message must come before it")
        yield place, messages


def check_message(place: str, message: dict[str, Any]) -> None:
    """Role and content of one message."""
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{place} has role {role!r}: known roles are {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        seen = "null" if content is None else "empty" if isinstance(content, str) else f"a {type(content).__name__}"
        raise InputError(f"{place} ({role}) has content that is {seen}: give it text, or remove the row")
