#!/usr/bin/env python3
"""Convert a table (Arrow, Feather, Parquet, a `datasets` folder or cache, a Hub snapshot or name) to JSON Lines.

python arrow2json.py SRC… [-o OUT.jsonl]

Reads and writes one record batch at a time, so memory does not depend on the number of rows. The output appears whole
or not at all, with a manifest (OUT.manifest.json) beside it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from open_instruct.data.lines import open_bytes
from open_instruct.data.shards import Shard, find_shards
from open_instruct.errors import InputError, exit_code
from open_instruct.files import AtomicFile, check_output, write_json

DEFAULT_OUTPUT = "data/tulu-3-sft-mixture-json/train.jsonl"
SUFFIX_OF = {"gzip": ".gz", "zstd": ".zst"}


def check_types(schema: pa.Schema, columns: Sequence[str]) -> None:
    """Refuse types that JSON can't hold exactly."""

    def holds(kind: Any) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return holds(kind.value_type)
        if pa.types.is_struct(kind):
            return all([holds(kind.field(i).type) for i in range(kind.num_fields)])
        plain = (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_boolean,
            pa.types.is_null,
            pa.types.is_integer,
        )
        return any(test(kind) for test in plain) or bool(kind in (pa.float32(), pa.float64()))

    bad = [f"{name} ({schema.field(name).type})" for name in columns if not holds(schema.field(name).type)]
    if bad:
        raise InputError(f"JSON can't hold the columns {', '.join(bad)} exactly: choose others with --columns")


def to_lines(batch: pa.RecordBatch | pa.Table, place: str) -> bytes:
    """One JSON object a line, as UTF-8.

    polars formats numbers so that they read back equal. It trusts Arrow that text is UTF-8; the output shows whether it was.

    Raises:
        InputError: text that is not UTF-8, or a number that JSON does not have.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if has_floats(column.type) and any_not_finite(column):
            raise InputError(
                f"{place}: column {name} holds NaN or an infinity, which JSON does not have: choose others with --columns"
            )
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    buffer = io.BytesIO()
    frame.lazy().sink_ndjson(buffer)
    lines = buffer.getvalue()
    try:
        pl.Series([lines], dtype=pl.Binary).cast(pl.String)  # the fastest check of UTF-8 at hand
    except pl.exceptions.PolarsError:
        row = next(
            number for number, line in enumerate(lines.split(b"\n")) if line.decode("utf-8", "ignore").encode() != line
        )
        raise InputError(
            f"{place}: the text of row {row} of these is not valid UTF-8: fetch the file again, or drop the row"
        ) from None
    return lines


def any_not_finite(array: pa.Array | pa.ChunkedArray) -> bool:
    """Whether a NaN or an infinity stands anywhere in an array, nested or not."""
    if isinstance(array, pa.ChunkedArray):
        return any(any_not_finite(chunk) for chunk in array.chunks)
    if pa.types.is_floating(array.type):
        return pc.any(pc.invert(pc.is_finite(array))).as_py() or False
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return any_not_finite(array.flatten())
    if pa.types.is_struct(array.type):
        return any(any_not_finite(child) for child in array.flatten())
    return False


def has_floats(kind: pa.DataType) -> bool:
    """Whether floating-point numbers can stand anywhere in a type."""
    return bool(pa.types.is_floating(kind)) or any(has_floats(kind.field(i).type) for i in range(kind.num_fields))


def rows_of(
    shards: Sequence[Shard], columns: Sequence[str], start: int, stop: int
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows [start, stop) of all shards together, as (place, batch)."""
    first = 0
    for shard in shards:
        if first >= stop:
            return
        if first + shard.num_rows > start:
            row = first
            for batch in shard.batches():
                low, high = max(start - row, 0), min(stop - row, batch.num_rows)
                if low < high:
                    yield (
                        f"{shard.path} rows {row - first + low}-{row - first + high - 1}",
                        batch.select(columns).slice(low, high - low),
                    )
                row += batch.num_rows
        first += shard.num_rows


def grouped(batches: Iterator[tuple[str, pa.RecordBatch]], most_rows: int = 4000) -> Iterator[tuple[str, pa.Table]]:
    """Record batches joined without copying to about `most_rows`: polars' threads need that much to share."""
    waiting: list[pa.RecordBatch] = []
    first = ""
    for place, batch in batches:
        first = first or place
        waiting.append(batch)
        if sum(item.num_rows for item in waiting) >= most_rows:
            yield first, pa.Table.from_batches(waiting)
            waiting, first = [], ""
    if waiting:
        yield first, pa.Table.from_batches(waiting)


def convert(shards: Sequence[Shard], columns: Sequence[str], output: Path, start: int, stop: int, form: str, compression: str | None,
            progress: tqdm) -> AtomicFile:  # fmt: skip
    """Write the rows [start, stop) to one file."""
    done = 0

    def needed() -> int:
        return file.num_bytes * (stop - start) // max(done, 1)

    with AtomicFile(output, compression, needed) as file:
        if form == "json":
            file.write(b"[\n")
        for place, batch in grouped(rows_of(shards, columns, start, stop)):
            lines = to_lines(batch, place)
            done += batch.num_rows
            if form == "json":  # a line break inside a value is always escaped, so each one ends a row
                lines = lines[:-1].replace(b"\n", b",\n") + (b",\n" if start + done < stop else b"\n]\n")
            file.write(lines)
            progress.update(batch.num_rows)
    return file


def verify(shards: Sequence[Shard], columns: Sequence[str], outputs: Sequence[Path], form: str) -> int:
    """Read both sides back, the output by Python's own JSON parser, and compare every row. Returns the number of rows."""
    total = sum(shard.num_rows for shard in shards)
    expected = (row for _, batch in rows_of(shards, columns, 0, total) for row in batch.to_pylist())
    count = 0
    for output in outputs:
        with open_bytes(output) as stream:
            for line in tqdm(stream, desc=f"verifying {output.name}", unit=" rows", disable=None):
                if form == "json":
                    line = line.strip().rstrip(b",")
                    if line in (b"[", b"]"):
                        continue
                seen, row = json.loads(line), next(expected, None)
                if seen != row:
                    raise InputError(f"{output}: row {count} differs from the source: convert it again")
                count += 1
    if count != total:
        raise InputError(f"verification failed: {count} rows were written, the source has {total}")
    return count


def run(a: argparse.Namespace) -> None:
    """Find, check, convert, record, verify."""
    started = time.perf_counter()
    shards = find_shards(a.sources, a.split)
    total = sum(shard.num_rows for shard in shards)
    if total == 0:
        raise InputError(f"{', '.join(a.sources)} holds no row: there is nothing to convert")
    unknown = [name for name in a.columns or [] if name not in shards[0].schema.names]
    if unknown:
        raise InputError(f"no column {', '.join(unknown)}: there are {', '.join(shards[0].schema.names)}")
    columns = a.columns or shards[0].schema.names
    check_types(shards[0].schema, columns)
    if a.shards > total:
        raise InputError(f"--shards {a.shards} is more than the {total} rows there are: ask for fewer")
    outputs = [a.output]
    if a.shards > 1:
        outputs = [
            a.output.with_name(f"{a.output.stem}-{i:05d}-of-{a.shards:05d}{a.output.suffix}") for i in range(a.shards)
        ]
    if a.compression:
        outputs = [path.with_name(path.name + SUFFIX_OF[a.compression]) for path in outputs]
    for path in outputs:
        check_output(path, [shard.path for shard in shards], a.overwrite)

    per_file = math.ceil(total / len(outputs))
    files = []
    with tqdm(total=total, unit=" rows", unit_scale=True, disable=None) as progress:
        for index, path in enumerate(outputs):
            bounds = (min(index * per_file, total), min((index + 1) * per_file, total))
            file = convert(shards, columns, path, *bounds, a.format, a.compression, progress)
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
    write_json(a.output.with_name(f"{a.output.name}.manifest.json"), manifest)
    size = manifest["bytes"] / 1e6
    print(
        f"{total:,} rows, {size:,.0f} MB in {seconds:.1f} s ({size / seconds:,.0f} MB/s) → {', '.join(str(path) for path in outputs[:3])}"
    )
    if a.verify:
        print(f"verified: all {verify(shards, columns, outputs, a.format):,} rows are equal")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--shards", type=positive, default=1, help="files to write, OUT-00000-of-0000N (default 1)")
    parser.add_argument("--split", default="train", help="split to take where a folder holds several (default train)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--verify", action="store_true", help="read both sides back and compare every row")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; `exit_code` says what it returns."""
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
