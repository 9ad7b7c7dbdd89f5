"""Files, folders and Hub data sets → rows, one at a time, each with its source ("train.jsonl:17"); → conversations."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from open_instruct.data import forms, lines, shards
from open_instruct.data.bad_rows import BadRows, note
from open_instruct.data.kinds import BYTE_ORDER_MARK, TABLE_SUFFIXES, file_kind, is_json, is_table, open_bytes
from open_instruct.data.sources import Conversation, source_in
from open_instruct.data.templates import MissingField
from open_instruct.data.texts import shown
from open_instruct.data.tools import TOOLS, Tools, tools_in
from open_instruct.errors import InputError, input_faults

if TYPE_CHECKING:  # it imports transformers, for which a first answer must not wait
    from open_instruct.data.context import ContextSource
    from open_instruct.data.rendering import Rendering

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
    shards.check_source_name(source)
    with input_faults(shown(source), "name a file, a folder or a data set"):
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    if is_file or (is_json(path) and not any(mark in source for mark in "*?[")):
        file_kind(path)  # refuses what can't be data
        files = [path]
    elif is_folder and not shards.is_saved_dataset(path):
        files = json_files(path)
    else:
        files = []
    if not files:
        return shards.source_files(source, split, configuration)
    if configuration:
        raise InputError(shards.no_configuration(source, configuration))
    return files


def json_files(folder: Path) -> list[Path]:
    """Return the JSON files of a folder in natural order, without hidden ones and records.

    Raises:
        InputError: one is a part of another; a shard is missing; or there are tables as well, which no manifest of
            `arrow2json.py` names as their source.
    """
    files = sorted((p for p in folder.iterdir() if is_json(p) and not shards.is_record(p)), key=shards.natural)
    shards.check_own(files)
    shards.check_sequence(files)
    tables = [p for p in folder.iterdir() if p.suffix in TABLE_SUFFIXES and not shards.is_record(p)]
    if files and tables and not any(folder.glob("*.manifest.json")):
        raise InputError(
            f"{folder} holds JSON files and tables ({files[0].name}, {tables[0].name}): name the files to read"
        )
    return files


def read_files(paths: Sequence[Path], bad: BadRows | None = None) -> Iterator[Row]:
    """Yield the rows of files of any known kind, one file after another.

    Args:
        paths: the files.
        bad: takes the errors of single rows; None: the first one is raised.

    Raises:
        InputError: a file is missing, empty, a Git LFS pointer, damaged, or of another kind; or a row is malformed.
    """
    for path in paths:
        yield from read_rows(path, bad)


def read_rows(path: Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Return the rows of one file; the file is checked at once, the rows are read one at a time.

    Raises:
        InputError: as `read_files`.
    """
    kind = file_kind(path)
    if is_table(path, kind):
        return read_table(path, bad)
    if not is_json(path):
        raise InputError(
            f"{path} ends in {path.suffix or 'nothing'}: "
            "conversations must be .jsonl, .json, .arrow, .feather or .parquet"
        )
    return read_json_array(path, bad) if kind == "json array" else read_json_lines(path, bad)


def read_json_lines(path: Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Yield one row a line; blank lines are left out."""
    with open_bytes(path) as file:
        for number in itertools.count(1):
            source = f"{path}:{number}"
            with input_faults(source, "fetch or compress the file again"):  # what the disk and the compression raise
                line = file.readline(lines.MAX_ROW_BYTES)
            if not line:
                return
            if len(line) == lines.MAX_ROW_BYTES:
                raise lines.too_long(source)
            text = (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).strip()
            if not text:
                continue
            try:
                row = lines.parse_line(source, text)
            except InputError as error:
                note(bad, error)
                continue
            yield source, row


def read_json_array(path: Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Yield the members of one JSON array, one at a time."""
    for number, value in enumerate(lines.array_rows(path), start=1):
        source = f"{path} row {number}"
        try:
            row = lines.as_row(source, value)
        except InputError as error:
            note(bad, error)
            continue
        yield source, row


def read_table(path: Path, bad: BadRows | None = None) -> Iterator[Row]:
    """Yield the rows of an Arrow, Feather or Parquet file; a record batch is held at a time."""
    shard = shards.open_shard(path)
    names = shard.schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{path} has several columns {shown(twice)}: give each a name of its own")
    first = 1  # number of the batch's first row
    for batch in shard.batches():
        for start in range(0, batch.num_rows, shards.BATCH_ROWS):
            part = batch.slice(start, shards.BATCH_ROWS)
            for number, row in enumerate(rows_of(part, path, first + start, bad), start=first + start):
                if row is not None:
                    yield f"{path} row {number}", row
        first += batch.num_rows


def rows_of(batch: pa.RecordBatch, path: Path, first: int, bad: BadRows | None) -> list[dict[str, Any] | None]:
    """Return the rows of a record batch, None in place of a bad one.

    Args:
        batch: the rows.
        path: their file, for errors.
        first: number of the first row, for errors.
        bad: takes the errors; None: the first one is raised.

    Raises:
        InputError: a row holds what Python does not: text that is not UTF-8, a date beyond the year 9999.
    """
    try:
        return list(batch.to_pylist())
    except Exception:  # which row it is, and why, is found out below
        rows: list[dict[str, Any] | None] = []
    for index in range(batch.num_rows):
        try:
            with input_faults(f"{path} row {first + index}", "repair or remove the row"):
                rows += batch.slice(index, 1).to_pylist()
        except InputError as error:
            note(bad, error)
            rows.append(None)
    return rows


def read_mixture(
    members: list[tuple[str, str]], splits: list[str], seed: int, bad: BadRows | None = None
) -> Iterator[Row]:
    """Yield the rows of several sources one after another, each read twice, to count and to choose, and none held.

    Args:
        members: (file, folder or data set, amount) pairs. An amount with a point is a share of the rows (1.0: all), one
            without is a number of rows, as in open-instruct.
        splits: one split for each member, or one for all.
        seed: decides which rows are drawn where an amount is less than all.
        bad: takes the errors of single rows; None: the first one is raised.

    Raises:
        InputError: the splits don't fit the members, or an amount does not fit its source.
    """
    if len(splits) not in (1, len(members)):
        raise InputError(f"{len(splits)} splits for {len(members)} data sets: give one for each, or one for all")
    for index, (name, amount) in enumerate(members):
        files = files_of(name, splits[index if len(splits) > 1 else 0])
        if amount == "1.0":
            yield from read_files(files, bad)
            continue
        num_rows = sum(1 for _ in read_files(files, BadRows(skip=True)))  # they are noted when they are read again
        count = mixture_count(name, amount, num_rows)
        chosen = set(random.Random(seed).sample(range(num_rows), count))
        yield from (row for number, row in enumerate(read_files(files, bad)) if number in chosen)


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


def conversations(
    rows: Iterable[Row],
    key: str = "messages",
    bad: BadRows | None = None,
    context: ContextSource | None = None,
    rendering: Rendering | None = None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield where each row stands, and its checked messages as a `Conversation`.

    Args:
        rows: the rows.
        key: column of the messages.
        bad: takes the errors of single rows, and decides whether good ones still count; None: the first is raised.
        context: finds each row's own context, which then begins its messages.
        rendering: makes conversations of each row's columns; None: it has a known form.

    Raises:
        InputError: a row is no conversation; or the first one lacks a column, as all will.
    """
    is_first = True
    for source, row in rows:
        try:
            made = rendering.conversations(source, row) if rendering else [forms.to_messages(source, row, key)]
            tools = offered_tools(source, row, rendering)
            if context:
                made = [context.with_context(source, row, messages) for messages in made]
        except InputError as error:
            note(None if is_first and is_of_all(error, bad) else bad, error)
            continue
        is_first = False
        if bad is None or bad.keep():
            for messages in made:
                yield source, Conversation(messages, source_in(row), tools)


def offered_tools(source: str, row: dict[str, Any], rendering: Rendering | None) -> Tools:
    """Return the schemas of a row's tools; none where a template writes its column `tools` itself.

    Raises:
        InputError: the column holds something else.
    """
    return () if rendering and TOOLS in rendering.fields else tools_in(source, row)


def is_of_all(error: InputError, bad: BadRows | None) -> bool:
    """Return whether a first row's error is one of all rows, which are then not read: a column is not there."""
    return isinstance(error, MissingField) and not (bad and bad.skip)
