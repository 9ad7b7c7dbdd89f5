"""Cache of tokenised data: folders that are complete, verified whenever they are read, and otherwise made anew.

CACHE/FINGERPRINT/tokens.arrow    rows, as an Arrow stream, memory-mapped
CACHE/FINGERPRINT/counts.json     counts of conversations, and the checksums of both files
CACHE/.FINGERPRINT.….writing      an entry in the making, locked by its process
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from open_instruct.data.duplicates import HASH_FIELDS
from open_instruct.data.sources import SOURCE
from open_instruct.errors import InputError, input_faults, system_fault, warn
from open_instruct.files import flush
from open_instruct.temporary import temporary_folder, temporary_name

TOKENS, COUNTS = "tokens.arrow", "counts.json"
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("spans", pa.list_(pa.int32()))])
CONTEXT_FIELD = pa.field("context", pa.list_(pa.int32()))  # tokens that stand before the row
SOURCE_FIELD = pa.field(SOURCE, pa.string())  # "" where the row names none
ANSWERS_FIELD = pa.field("answers", pa.list_(pa.int32()))  # spans of the assistant's turns, where others are learned

COUNTED = ("num_read", "num_truncated", "num_skipped", "first_label")
SAID = ("bad_rows", "by_template")
REMEDY = "free some space, name another folder with --dataset_local_cache_dir, or pass --dataset_skip_cache"


def schema_of(with_context: bool = False, with_answers: bool = False) -> pa.Schema:
    """Return the columns of an entry."""
    fields = [*SCHEMA, *([CONTEXT_FIELD] if with_context else []), *([ANSWERS_FIELD] if with_answers else [])]
    return pa.schema([*fields, SOURCE_FIELD, *HASH_FIELDS])


@dataclass(frozen=True)
class Tokenised:
    """Tokenised conversations."""

    table: pa.Table
    counts: dict[str, Any]
    content: str  # of ids and spans, whatever file or memory holds them
    entry: Path | None = None  # folder of the cache; None: in memory


class ContentHash:
    """Hash of the token ids and spans of a table, however its rows are cut into batches.

    Sources and hashes of texts are no part of it: rows that are cut to the same tokens train alike.
    """

    def __init__(self, schema: pa.Schema) -> None:
        """Start without a row."""
        self.names = [field.name for field in schema if pa.types.is_list(field.type)]
        self.parts = [hashlib.sha256() for _ in range(2 * len(self.names))]  # of each column: lengths, values

    def update(self, table: pa.Table) -> None:
        """Add rows."""
        for number, name in enumerate(self.names):
            column = table[name]
            lengths = pc.list_value_length(column).to_numpy().astype(np.int32)
            self.parts[2 * number].update(np.ascontiguousarray(lengths).data)
            for chunk in column.chunks:
                values = chunk.flatten().to_numpy(zero_copy_only=False)
                self.parts[2 * number + 1].update(np.ascontiguousarray(values).data)

    def hexdigest(self) -> str:
        """Return the hash of all rows so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self.parts)).hexdigest()[:32]


def content_of(table: pa.Table) -> str:
    """Return the hash of a table's values."""
    content = ContentHash(table.schema)
    content.update(table)
    return content.hexdigest()


def in_memory(tables: Iterable[pa.Table], counts: dict[str, Any], schema: pa.Schema = SCHEMA) -> Tokenised:
    """Collect tables; `counts` is complete when they are."""
    content, kept = ContentHash(schema), [schema.empty_table()]
    for table in tables:
        content.update(table)
        kept.append(table)
    return Tokenised(pa.concat_tables(kept), counts, content.hexdigest())


def load_or_fill(
    entry: Path, tables: Iterable[pa.Table], counts: dict[str, Any], overwrite: bool, schema: pa.Schema = SCHEMA
) -> Tokenised:
    """Return an entry of the cache, which is filled where it is missing or damaged.

    Args:
        entry: folder of the entry.
        tables: its rows, consumed only to fill it.
        counts: counts of `tables`, complete when they are consumed.
        overwrite: fill it anew.
        schema: of the tables.

    Raises:
        InputError: the disk is full.
    """
    found = None if overwrite else read(entry, schema)
    if found is not None:
        return found
    replaces = os.path.lexists(entry)
    with ExitStack() as held:
        try:
            working = held.enter_context(temporary_folder(entry))
        except OSError as error:
            warn(f"the token cache can't be written ({system_fault(error)}): the tokens of this run are kept in memory")
            return in_memory(tables, counts, schema)
        held.enter_context(removed_by_sigterm(working))
        write(working, tables, counts, schema)
        # Read under this name: under the other, a process that replaces the entry, too, may just have moved it away.
        written = read(working, schema)
        if written is None:
            raise InputError(f"token cache {entry.parent} does not keep what is written: {REMEDY}")
        with input_faults(f"token cache {entry.parent}", REMEDY):
            publish(working, entry, replaces, schema)
    return replace(written, entry=entry)


def read(entry: Path, schema: pa.Schema = SCHEMA) -> Tokenised | None:
    """Return an entry whose checksums are right; None where there is none, or a damaged one, which a warning names."""
    if not os.path.lexists(entry):
        return None
    try:
        with input_faults(f"entry {entry} of the token cache", "tokenising again"):
            missing = next((name for name in (COUNTS, TOKENS) if not (entry / name).is_file()), None)
            if missing:
                raise ValueError(f"{missing} is missing")
            known = json.loads((entry / COUNTS).read_text(encoding="utf-8"))
            if known.pop("sha256") != record_sum(known):
                raise ValueError(f"{COUNTS} does not match its checksum")
            if checksum(entry / TOKENS) != known[TOKENS]:
                raise ValueError(f"{TOKENS} does not match its checksum")
            table = pa.ipc.open_stream(pa.memory_map(str(entry / TOKENS))).read_all()
            if table.schema != schema:
                raise ValueError(f"{TOKENS} holds other columns")
            counts = {name: int(known[name]) for name in COUNTED} | {name: str(known[name]) for name in SAID}
            return Tokenised(table, counts, str(known["content"]), entry)
    except InputError as error:
        warn(str(error))
        return None


def write(working: Path, tables: Iterable[pa.Table], counts: dict[str, Any], schema: pa.Schema = SCHEMA) -> None:
    """Write an entry's files and flush them to the disk.

    Raises:
        InputError: the disk is full. What the source of the tables raises passes as it is.
    """
    content, what = ContentHash(schema), f"token cache {working.parent}"
    with input_faults(what, REMEDY), ExitStack() as opened:
        sink = opened.enter_context(pa.OSFile(str(working / TOKENS), "wb"))
        writer = opened.enter_context(pa.ipc.new_stream(sink, schema))
        files = opened.pop_all()
    try:
        for table in tables:
            content.update(table)
            with input_faults(what, REMEDY):
                writer.write_table(table)
    except BaseException:
        with suppress(OSError):  # on a full disk, closing fails once more
            files.close()
        raise
    with input_faults(what, REMEDY):
        files.close()
        record = {**counts, "content": content.hexdigest(), TOKENS: checksum(working / TOKENS)}
        (working / COUNTS).write_text(json.dumps({**record, "sha256": record_sum(record)}), encoding="utf-8")
        for path in (working / TOKENS, working / COUNTS, working):
            flush(path)


def publish(working: Path, entry: Path, replaces: bool, schema: pa.Schema = SCHEMA) -> None:
    """Give a filled folder its final name.

    Args:
        working: the folder.
        entry: its final name. An old entry is moved away before it is deleted: at no time is there half a one.
        replaces: an entry is to be replaced; else an intact one, which another process made meanwhile, is kept.
        schema: of its rows.
    """
    for _ in range(3):
        try:
            os.replace(working, entry)
        except OSError:
            if not os.path.lexists(entry):
                raise
            if not replaces and read(entry, schema) is not None:
                return
            old = temporary_name(entry)
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(entry, old)
            remove(old)
        else:
            flush(entry.parent)
            return


def record_sum(record: dict[str, Any]) -> str:
    """Return the checksum of what counts.json says."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file (1.8 GB/s on one core), with a progress bar if it takes more than two seconds."""
    digest = hashlib.sha256()
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None, "delay": 2}
    with path.open("rb", buffering=0) as file, tqdm(desc="verifying", total=path.stat().st_size, **options) as bar:
        while block := file.read(1 << 24):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Remove a folder, or a file or link in its place, if it is there."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def removed_by_sigterm(working: Path) -> Iterator[None]:
    """Remove a folder if SIGTERM would end this process meanwhile; another handler of SIGTERM is left in place."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        remove(working)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
