"""Where a table lies on disk: Arrow, Feather and Parquet files, `datasets` folders and caches, Hub snapshots → ordered shards.

A shard is one file. Record batches are read one at a time, so memory does not depend on the number of rows.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from open_instruct.errors import InputError

BATCH_ROWS = 1000
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SHARD_NAME = re.compile(r"^(?P<stem>.*?)-?(?P<index>\d{5})-of-(?P<count>\d{5})")
SPLIT_NAME = re.compile(r"(?:^|[-_/])(train|validation|valid|test|dev)(?:[-_.]|$)")
SUFFIXES = (".arrow", ".feather", ".parquet")


@dataclass(frozen=True)
class Shard:
    """One file of a table. `kind` is what its first bytes say: an Arrow stream, an Arrow (Feather) file, or Parquet."""

    path: Path
    kind: str
    num_rows: int
    schema: pa.Schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The record batches, in order."""
        try:
            if self.kind == "parquet":
                yield from pyarrow.parquet.ParquetFile(self.path).iter_batches(batch_size=BATCH_ROWS)
                return
            # Not memory-mapped: the pages that were read would count as resident until the file is closed.
            with pa.OSFile(str(self.path), "rb") as source:
                if self.kind == "stream":
                    yield from pa.ipc.open_stream(source)
                else:
                    reader = pa.ipc.open_file(source)
                    for index in range(reader.num_record_batches):
                        yield reader.get_batch(index)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{self.path} is damaged ({one_line(error)}): fetch it again") from None


def open_shard(path: Path) -> Shard:
    """Recognise a file by its first bytes, and count its rows without reading its columns.

    Raises:
        InputError: it is missing, empty, a Git LFS pointer, truncated, or no table.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    with path.open("rb") as file:
        head = file.read(24)
        file.seek(max(0, path.stat().st_size - 8))
        tail = file.read()
    if not head:
        raise InputError(f"{path} is empty: fetch it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
    try:
        if head.startswith(b"PAR1"):
            parquet = pyarrow.parquet.ParquetFile(path)
            return Shard(path, "parquet", parquet.metadata.num_rows, parquet.schema_arrow)
        with pa.memory_map(str(path)) as source:
            if head.startswith(b"ARROW1"):
                reader = pa.ipc.open_file(source)
                rows = sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
                return Shard(path, "file", rows, reader.schema)
            if not head.startswith(b"\xff\xff\xff\xff"):
                raise InputError(
                    f"{path} is neither Arrow nor Parquet: name a .arrow, .feather or .parquet file, or a folder of them"
                )
            stream = pa.ipc.open_stream(source)
            rows = sum(batch.num_rows for batch in stream)
            if tail != END_OF_STREAM:  # a stream that stops between two batches reads without an error
                raise InputError(f"{path} is truncated (it has no end mark after {rows} rows): fetch it again")
            return Shard(path, "stream", rows, stream.schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is truncated or damaged ({one_line(error)}): fetch it again") from None


def find_shards(sources: Sequence[str], split: str = "train") -> list[Shard]:
    """Files, folders, globs or Hub names → the shards of one table, in order.

    Raises:
        InputError: nothing is found, a shard of a `-of-` sequence is missing, or shards have different columns.
    """
    paths = [path for source in sources for path in source_files(source, split)]
    shards = [open_shard(path) for path in paths]
    first = shards[0]
    for shard in shards[1:]:
        if not shard.schema.equals(first.schema):
            raise InputError(
                f"shards have different columns: {first.path} has {describe(first.schema)}, {shard.path} has {describe(shard.schema)}: "
                "convert them apart, or choose --columns that they share in files of their own"
            )
    return shards


def source_files(source: str, split: str) -> list[Path]:
    """The table files that one source names, in order. A shard may be named alone; a folder or glob must hold them all."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    found = matching_files(source, path, split)
    check_sequence(found)
    return found


def matching_files(source: str, path: Path, split: str) -> list[Path]:
    """The files of a folder, a glob or a data set on the Hub."""
    if path.is_dir():
        return folder_files(path, split)
    if glob.has_magic(source):
        found = sorted((Path(name) for name in glob.glob(source)), key=natural)
        if not found:
            raise InputError(f"no file matches {source}")
        return found
    if source.count("/") <= 1 and not source.startswith((".", "/", "~")) and path.suffix not in SUFFIXES:
        return hub_files(source, split)
    raise InputError(f"no such file or folder: {source}")


def folder_files(folder: Path, split: str) -> list[Path]:
    """The table files of a `save_to_disk` folder, a `datasets` cache, a Hub cache or snapshot, or a plain folder."""
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise InputError(f"{folder} has the splits {', '.join(splits)}, not {split}: choose one with --split")
        folder = folder / split
    if (folder / "state.json").exists():
        return [folder / item["filename"] for item in json.loads((folder / "state.json").read_text())["_data_files"]]
    if (folder / "refs" / "main").exists() and (folder / "snapshots").is_dir():
        folder = folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    found = [p for p in folder.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith(("cache-", "tmp", "."))]
    splits = {match.group(1) for p in found if (match := SPLIT_NAME.search(p.name))}
    if splits:
        found = [p for p in found if (match := SPLIT_NAME.search(p.name)) and match.group(1) == split]
        if not found:
            raise InputError(
                f"{folder} has the splits {', '.join(sorted(splits))}, not {split}: choose one with --split"
            )
    if not found:
        raise InputError(f"{folder} holds no .arrow, .feather or .parquet file")
    parents = sorted({p.parent for p in found})
    if len(parents) > 1:
        raise InputError(
            f"{folder} holds several tables ({', '.join(str(p.relative_to(folder)) for p in parents[:4])}): name one of them"
        )
    return sorted(found, key=natural)


def hub_files(name: str, split: str) -> list[Path]:
    """The cached Arrow files of a data set on the Hub, downloaded if the network allows."""
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # `datasets` and the Hub raise dozens of types; each means that the name can't be loaded
        raise InputError(f"no file, folder or data set {name} ({one_line(error)})") from None
    return [Path(item["filename"]) for item in table.cache_files]


def check_sequence(paths: Sequence[Path]) -> None:
    """Every shard of a `-00000-of-00006` sequence must be there, once."""
    sequences: dict[tuple[Path, str, str], set[int]] = {}
    for path in paths:
        if match := SHARD_NAME.match(path.name):
            sequences.setdefault((path.parent, match["stem"], match["count"]), set()).add(int(match["index"]))
    for (parent, stem, count), indices in sequences.items():
        missing = sorted(set(range(int(count))) - indices)
        if missing:
            names = ", ".join(f"{stem}-{index:05d}-of-{count}" for index in missing[:3])
            raise InputError(
                f"{len(missing)} of {int(count)} shards are missing in {parent} (the first: {names}): fetch them"
            )


def natural(path: Path) -> list[Any]:
    """Sort key in which part-2 comes before part-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def describe(schema: pa.Schema) -> str:
    """Columns and types on one line."""
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, cut to a readable length."""
    return " ".join(str(error).split())[:200]
