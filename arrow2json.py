#!/usr/bin/env python3
"""Convert a table (Arrow, Feather, Parquet, a `datasets` folder or cache, a Hub snapshot or name) to JSON Lines.

python arrow2json.py SRC… [-o OUT.jsonl]

Reads and writes one record batch at a time, so memory does not depend on the number of rows. The output appears whole
or not at all, with a manifest (OUT.manifest.json) beside it.
"""

from __future__ import annotations

import open_instruct.interrupts  # first: it answers signals while the rest is imported

# isort: split
import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from open_instruct.command_line import OneLineArgumentParser, at_least
from open_instruct.data.kinds import open_bytes
from open_instruct.data.shards import Shard, find_shards
from open_instruct.data.texts import plain
from open_instruct.data.to_json import check_types, to_lines
from open_instruct.errors import InputError, exit_code
from open_instruct.files import AtomicFile, check_output, followed_by, write_json

DEFAULT_OUTPUT = "data/tulu-3-sft-mixture-json/train.jsonl"
SUFFIX_OF = {"gzip": ".gz", "zstd": ".zst"}


def rows_of(
    shards: Sequence[Shard], columns: Sequence[str], start: int, stop: int
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Yield the rows [start, stop) of all shards together, as (source, batch); the source is for errors."""
    first = 0  # number of the shard's first row
    for shard in shards:
        if first >= stop:
            return
        if first + shard.num_rows > start:
            row = first
            for batch in shard.batches():
                low, high = max(start - row, 0), min(stop - row, batch.num_rows)
                if low < high:
                    source = f"{shard.path} rows {row - first + low}-{row - first + high - 1}"
                    yield source, batch.select(columns).slice(low, high - low)
                row += batch.num_rows
        first += shard.num_rows


def grouped(batches: Iterator[tuple[str, pa.RecordBatch]], min_rows: int = 4000) -> Iterator[tuple[str, pa.Table]]:
    """Join record batches, without copying, until there are `min_rows`: polars' threads need that many to share."""
    waiting: list[pa.RecordBatch] = []
    first = ""
    for source, batch in batches:
        first = first or source
        waiting.append(batch)
        if sum(item.num_rows for item in waiting) >= min_rows:
            yield first, pa.Table.from_batches(waiting)
            waiting, first = [], ""
    if waiting:
        yield first, pa.Table.from_batches(waiting)


def convert(
    shards: Sequence[Shard],
    columns: Sequence[str],
    output: Path,
    start: int,
    stop: int,
    form: str,
    compression: str | None,
    progress: tqdm,
) -> AtomicFile:
    """Write the rows [start, stop) to one file.

    Args:
        shards: the table.
        columns: the columns to keep, in order.
        output: the file to write.
        start: number of the first row.
        stop: number after the last row.
        form: "jsonl" or "json".
        compression: None, "gzip" or "zstd".
        progress: the bar to move, in rows.

    Raises:
        InputError: JSON can't hold a row, or the disk is full.
    """
    done = 0

    def bytes_needed() -> int:
        return file.num_bytes * (stop - start) // max(done, 1)

    with AtomicFile(output, compression, bytes_needed) as file:
        if form == "json":
            file.write(b"[\n")
        for source, batch in grouped(rows_of(shards, columns, start, stop)):
            lines = to_lines(batch, source)
            done += batch.num_rows
            if form == "json":  # a line break inside a value is always escaped, so each one ends a row
                lines = lines[:-1].replace(b"\n", b",\n") + (b",\n" if start + done < stop else b"\n]\n")
            file.write(lines)
            progress.update(batch.num_rows)
    return file


def verify(shards: Sequence[Shard], columns: Sequence[str], outputs: Sequence[Path], form: str) -> int:
    """Read both sides back, the output with Python's own JSON parser, and compare every row. Return the number of rows.

    Raises:
        InputError: a row differs, or is missing.
    """
    total = sum(shard.num_rows for shard in shards)
    kinds = {name: shards[0].schema.field(name).type for name in columns}
    expected = (row for _, batch in rows_of(shards, columns, 0, total) for row in batch.to_pylist())
    count = 0
    for output in outputs:
        with open_bytes(output) as stream:
            for line in tqdm(stream, desc=f"verifying {output.name}", unit=" rows", disable=None):
                if form == "json":
                    line = line.strip().rstrip(b",")
                    if line in (b"[", b"]"):
                        continue
                if not same(json.loads(line), next(expected, None), kinds):
                    raise InputError(f"{output}: row {count} differs from the source: convert it again")
                count += 1
    if count != total:
        raise InputError(f"verification failed: {count} rows were written, the source has {total}")
    return count


def same(value: Any, expected: Any, kinds: dict[str, pa.DataType]) -> bool:
    """Return whether a row read back from JSON equals the source's, in the columns' own precision."""
    if value == expected:
        return True
    if not isinstance(value, dict) or not isinstance(expected, dict) or list(value) != list(expected):
        return False
    # A float32 of 0.1 is written as 0.1, and is read back as a float64, which is another number.
    return bool(expected == {name: pa.scalar(value[name], kind).as_py() for name, kind in kinds.items()})


def run(a: argparse.Namespace) -> None:
    """Find the shards, check everything, convert, write the manifest, verify."""
    started = time.perf_counter()
    shards = find_shards(a.sources, a.split)
    total = sum(shard.num_rows for shard in shards)
    if total == 0:
        raise InputError(f"{', '.join(a.sources)} holds no row: there is nothing to convert")
    unknown = [plain(name) for name in a.columns or [] if name not in shards[0].schema.names]
    if unknown:
        raise InputError(f"no column {', '.join(unknown)}: there are {plain(', '.join(shards[0].schema.names))}")
    columns = a.columns or shards[0].schema.names
    check_types(shards[0].schema, columns)
    if a.shards > total:
        raise InputError(f"--shards {a.shards} is more than the {total} rows there are: ask for fewer")
    if a.output.name in ("", ".."):
        raise InputError(f"output {a.output} is a folder: name a file with -o")
    outputs = [a.output]
    if a.shards > 1:
        outputs = [
            a.output.with_name(f"{a.output.stem}-{i:05d}-of-{a.shards:05d}{a.output.suffix}") for i in range(a.shards)
        ]
    if a.compression:
        outputs = [path.with_name(path.name + SUFFIX_OF[a.compression]) for path in outputs]
    manifest_path = a.output.with_name(f"{a.output.name}.manifest.json")
    for path in (*outputs, manifest_path):
        check_output(path, [shard.path for shard in shards], a.overwrite)

    per_file = math.ceil(total / len(outputs))
    files = []
    progress = tqdm(total=total, unit=" rows", unit_scale=True, disable=None)
    with progress, followed_by(manifest_path) as finished:
        for index, path in enumerate(outputs):
            bounds = (min(index * per_file, total), min((index + 1) * per_file, total))
            file = convert(shards, columns, path, *bounds, a.format, a.compression, progress)
            finished.append(path)
            files.append(
                {"path": str(path), "rows": bounds[1] - bounds[0], "bytes": file.num_bytes, "sha256": file.sha256}
            )
        seconds = time.perf_counter() - started
        manifest = {
            "rows": total,
            "bytes": sum(item["bytes"] for item in files),
            "columns": {name: str(shards[0].schema.field(name).type) for name in columns},
            "files": files,
            "format": a.format,
            "compression": a.compression,
            "sources": [{"path": str(s.path), "rows": s.num_rows, "bytes": s.path.stat().st_size} for s in shards],
        }
        write_json(manifest_path, manifest)
    size = manifest["bytes"] / 1e6
    names = ", ".join(str(path) for path in outputs[:3])
    print(f"{total:,} rows, {size:,.0f} MB in {seconds:.1f} s ({size / seconds:,.0f} MB/s) → {names}")
    if a.verify:
        print(f"verified: all {verify(shards, columns, outputs, a.format):,} rows are equal")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", nargs="+", metavar="SRC", help="files, folders, globs or a data set's name on the Hub"
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(DEFAULT_OUTPUT), help=f"file to write (default {DEFAULT_OUTPUT})"
    )
    parser.add_argument(
        "--format", choices=["jsonl", "json"], default="jsonl", help="one object a line, or one JSON array"
    )
    parser.add_argument(
        "--compression", choices=list(SUFFIX_OF), help="compress the output; .gz or .zst is added to its name"
    )
    parser.add_argument("--columns", nargs="+", help="columns to keep, in this order (default: all)")
    parser.add_argument("--shards", type=at_least(1), default=1, help="files to write, OUT-00000-of-0000N (default 1)")
    parser.add_argument("--split", default="train", help="split to take where a folder holds several (default train)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--verify", action="store_true", help="read both sides back and compare every row")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code: 0, 2 after wrong input, 130 after an interrupt."""
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    open_instruct.interrupts.end_process(main())
