"""Arrow, Feather and Parquet files, `datasets` folders and caches, Hub snapshots and Hub names → the shards of a table.

A shard is one file. Record batches are read one at a time, so memory does not depend on the number of rows.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from open_instruct.data.arrow_checks import check_batch
from open_instruct.data.kinds import TABLE_MAGIC, TABLE_SUFFIXES, file_kind
from open_instruct.data.texts import shown
from open_instruct.errors import InputError, input_faults, one_line
from open_instruct.small_files import read_json

BATCH_ROWS = 1000
MAX_RECORD_BYTES = 1 << 28  # a manifest may count millions of values
AGAIN = "fetch the folder again, or name its files"
RECORDS = (".manifest.json", ".run.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SHARD_NAME = re.compile(r"^(?P<stem>.*?)-?(?P<index>\d{5})-of-(?P<count>\d{5})")
SPLIT_NAME = re.compile(r"(?:^|[-_/])(train|validation|valid|test|dev)(?:[-_.]|$)")


@dataclass(frozen=True)
class Shard:
    """One file of a table."""

    path: Path
    kind: str  # as `kinds.file_kind` names it: "arrow stream", "arrow file" (Feather) or "parquet"
    num_rows: int
    schema: pa.Schema

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the record batches, in order, each checked by `check_batch`.

        Raises:
            InputError: the file is damaged.
        """
        with damages(self.path):
            for batch in self._batches():
                check_batch(batch)
                yield batch

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if self.kind == "parquet":
            yield from pyarrow.parquet.ParquetFile(self.path).iter_batches(batch_size=BATCH_ROWS)
            return
        # Not memory-mapped: the pages that were read would count as resident until the file is closed.
        with pa.OSFile(str(self.path), "rb") as source:
            if self.kind == "arrow stream":
                yield from pa.ipc.open_stream(source)
            else:
                reader = pa.ipc.open_file(source)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)


def damages(path: Path) -> AbstractContextManager[None]:
    """Turn what Arrow raises about a file into an InputError."""
    return input_faults(f"{path}, truncated or damaged,", "fetch it again")


def open_shard(path: Path) -> Shard:
    """Recognise a file by its first bytes, and count its rows without reading its columns.

    Raises:
        InputError: the file is missing, empty, a Git LFS pointer, truncated, or no table.
    """
    kind = file_kind(path)
    if kind not in TABLE_MAGIC.values():
        raise InputError(
            f"{path} is neither Arrow nor Parquet: name a .arrow, .feather or .parquet file, or a folder of them"
        )
    with damages(path):
        shard = Shard(path, kind, *rows_and_schema(path, kind))
        schema_text(shard.schema)  # raises where a name is not UTF-8
    return shard


def rows_and_schema(path: Path, kind: str) -> tuple[int, pa.Schema]:
    """Return the number of rows of a table file, and its schema.

    Raises:
        InputError: an Arrow stream has no end mark.
    """
    if kind == "parquet":
        parquet = pyarrow.parquet.ParquetFile(path)
        return parquet.metadata.num_rows, parquet.schema_arrow
    with pa.memory_map(str(path)) as source:
        if kind == "arrow file":
            reader = pa.ipc.open_file(source)
            return sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches)), reader.schema
        stream = pa.ipc.open_stream(source)
        num_rows = sum(batch.num_rows for batch in stream)
        source.seek(max(0, source.size() - len(END_OF_STREAM)))
        if source.read() != END_OF_STREAM:  # a stream that stops between two batches reads without an error
            raise InputError(f"{path} is truncated (it has no end mark after {num_rows} rows): fetch it again")
        return num_rows, stream.schema


def find_shards(sources: Sequence[str], split: str = "train") -> list[Shard]:
    """Return the shards of one table, in order, from the names of files, folders, globs or Hub data sets.

    Raises:
        InputError: nothing is there, a shard of a `-of-` sequence is missing, or shards have different columns.
    """
    paths = [path for source in sources for path in source_files(source, split)]
    shards = [open_shard(path) for path in paths]
    first = shards[0]
    for shard in shards[1:]:
        if not shard.schema.equals(first.schema):
            raise InputError(
                f"shards have different columns: {first.path} has {schema_text(first.schema)}, "
                f"{shard.path} has {schema_text(shard.schema)}: "
                "convert them apart, or choose --columns that they share in files of their own"
            )
    return shards


def source_files(source: str, split: str, configuration: str | None = None) -> list[Path]:
    """Return the table files that one source names, in order.

    Args:
        source: a file, which may be one shard of several; a folder or glob, which must hold all shards; or a data set
            on the Hub.
        split: the split to take, where the source has several.
        configuration: the configuration of a data set on the Hub; None: its only one.

    Raises:
        InputError: nothing is there, a shard is missing, or a configuration is given for a file or folder.
    """
    check_source_name(source)
    path = Path(source).expanduser()
    is_local = path.exists() or glob.has_magic(source)
    if configuration and is_local:
        raise InputError(no_configuration(source, configuration))
    if path.is_file():
        return [path]
    if path.is_dir():
        files = folder_files(path, split)
    elif is_local:
        files = sorted((Path(name) for name in glob.glob(str(path)) if not is_record(Path(name))), key=natural)
        check_own(files)
        if not files:
            raise InputError(f"no file matches {source}: check the pattern")
    elif source.count("/") <= 1 and not source.startswith((".", "/", "~")) and path.suffix not in TABLE_SUFFIXES:
        files = hub_files(source, split, configuration)
    else:
        raise InputError(f"no such file or folder: {source}")
    check_sequence(files)
    return files


def check_source_name(source: str) -> None:
    """Raise an InputError if a source has no name: "" would be the current folder."""
    if not source.strip():
        raise InputError("the name of a data file is empty: name a file, a folder or a data set")


def no_configuration(source: str, configuration: str) -> str:
    """Return the error message for a configuration of a local source, which can't have one."""
    return (
        f"{source} is on this disk, and configurations (here {configuration}) belong to data sets on the Hub: "
        "leave it out, or name the folder that holds the configuration"
    )


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").exists() or (
        (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    )


def folder_files(folder: Path, split: str) -> list[Path]:
    """Return the table files of a `save_to_disk` folder, `datasets` cache, Hub cache or snapshot, or plain folder.

    Raises:
        InputError: there is none, the split is missing, there are several tables, or the folder's record is damaged.
    """
    if (folder / "dataset_dict.json").exists():
        with metadata(folder / "dataset_dict.json") as value:
            splits = [plain_name(name) for name in list_of(value, "splits")]
        if split not in splits:
            raise InputError(f"{folder} has the splits {', '.join(splits)}, not {split}: choose one with --split")
        folder = folder / split
    if (folder / "state.json").exists():
        return saved_files(folder)
    if (folder / "refs" / "main").exists() and (folder / "snapshots").is_dir():
        with input_faults(str(folder / "refs" / "main"), AGAIN):
            folder = folder / "snapshots" / plain_name((folder / "refs" / "main").read_text(encoding="utf-8").strip())
    files = [
        p for p in folder.rglob("*") if p.suffix in TABLE_SUFFIXES and not p.name.startswith(("cache-", "tmp", "."))
    ]
    split_of = {p: match.group(1) for p in files if (match := SPLIT_NAME.search(p.name))}
    if split_of:
        files = [p for p in files if split_of.get(p) == split]
        if not files:
            splits = sorted(set(split_of.values()))
            raise InputError(f"{folder} has the splits {', '.join(splits)}, not {split}: choose one with --split")
    if not files:
        raise InputError(f"{folder} holds no .arrow, .feather or .parquet file: name another folder")
    parents = sorted({p.parent for p in files})
    if len(parents) > 1:
        tables = ", ".join(str(p.relative_to(folder)) for p in parents[:4])
        raise InputError(f"{folder} holds several tables ({tables}): name one of them")
    return sorted(files, key=natural)


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files that `Dataset.save_to_disk` wrote into a folder, in order.

    Raises:
        InputError: its record is damaged, names none, or others; or rows are chosen by indices, as old versions did.
    """
    with metadata(folder / "state.json") as value:
        names = [plain_name(item["filename"]) for item in list_of(value, "_data_files")]
        if not names:
            raise ValueError("it names no file")
        if value.get("_indices_files") or value.get("_indices_data_files"):
            raise ValueError("it chooses rows by indices, as old versions of `datasets` did")
    return [folder / name for name in names]


@contextmanager
def metadata(path: Path) -> Iterator[Any]:
    """Read a small JSON file of a data folder, whose contents the block looks into.

    Raises:
        InputError: the file is damaged, or holds something else.
    """
    with input_faults(str(path), AGAIN):
        yield read_json(path, str(path), AGAIN, MAX_RECORD_BYTES)


def list_of(value: Any, key: str) -> list[Any]:
    """Return the list that stands in an object under a key.

    Raises:
        ValueError: there is none.
    """
    items = value.get(key) if isinstance(value, dict) else None
    if not isinstance(items, list):
        raise ValueError(f"it has no list {key}")
    return items


def plain_name(name: Any) -> str:
    """Return the name of a file or folder that a record names beside itself.

    Raises:
        ValueError: it is elsewhere, or no name.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "\0" in name or Path(name).name != name:
        raise ValueError(f"it names {shown(name)}, which is not in its folder")
    return name


def is_record(path: Path) -> bool:
    """Return whether a file in a folder of data is none: hidden, or what this project's tools and `datasets` note."""
    return path.name.startswith(".") or path.name.endswith(RECORDS)


def manifests(path: Path, kind: str) -> Iterator[Path]:
    """Yield the manifests of `sample_subsets.py` beside a file; `kind` is "subsets" or "splits"."""
    yield from path.parent.glob(f"*_{kind}*.manifest.json")


def check_own(files: Sequence[Path]) -> None:
    """Refuse files of which one is, as a manifest of `sample_subsets.py` says, a part of another.

    Raises:
        InputError: rows would be read twice; or a manifest beside the files is damaged.
    """
    present = {path.resolve() for path in files}
    kinds = {found: kind for path in files for kind in ("subsets", "splits") for found in manifests(path, kind)}
    for manifest, kind in sorted(kinds.items()):
        with metadata(manifest) as value:
            records = [value["input"], *list_of(value, kind)]
            named = [(manifest.parent / Path(record["path"]).name).resolve() for record in records]
        both = [path for path in dict.fromkeys(named) if path in present]
        if len(both) > 1 and (kind == "subsets" or named[0] in both):  # splits have no row in common
            raise InputError(
                f"{both[0].parent} holds {both[0].name} and {both[1].name}, of which one is a part of the other "
                f"({manifest.name} says so): name the files to read"
            )


def hub_files(name: str, split: str, configuration: str | None = None) -> list[Path]:
    """Return the cached Arrow files of a data set on the Hub, downloaded if the network allows.

    Raises:
        InputError: the data set can't be loaded, or the split is only a part of one.
    """
    if "[" in split or "+" in split:  # a part shares the files of its split, so all rows would be read
        raise InputError(f"split {split!r} of {name} is not the name of one split: give a name, such as train")
    import datasets

    try:
        table = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # `datasets` and the Hub raise dozens of types; each means that the name can't be loaded
        raise InputError(
            f"no file, folder or data set {name} ({one_line(error, 200)}): check the name, or give a file"
        ) from None
    files = [Path(item["filename"]) for item in table.cache_files]
    if not files:
        raise InputError(f"data set {name} is not kept on the disk: unset HF_DATASETS_IN_MEMORY_MAX_SIZE")
    return files


def check_sequence(paths: Sequence[Path]) -> None:
    """Raise an InputError if a shard of a `-00000-of-00006` sequence is missing."""
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
    """Return a sort key by which part-2 comes before part-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def schema_text(schema: pa.Schema) -> str:
    """Return the columns and types of a schema, on one line."""
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
