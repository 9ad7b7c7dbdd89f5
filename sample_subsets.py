#!/usr/bin/env python3
"""Draw nested, seeded subsets from a file of conversations, or split it.

python sample_subsets.py FILE --sizes 9000 90000 --seed 42 [--stratify source] [-o DIR]
python sample_subsets.py FILE --splits train=0.8 validation=0.1 test=0.1 --seed 42 [-o DIR]

Each smaller subset is part of each larger one. The same seed gives the same bytes on every machine and Python version.
Splits are disjoint; a hash of the conversation decides, so a row stays on its side when rows are added, and equal
conversations are on one side. The file (JSON Lines, a JSON array, Arrow or Parquet) is never held in memory. Beside the
subsets stand a manifest and a picture of the sources, input against subsets.
"""

from __future__ import annotations

import open_instruct.interrupts  # first: it answers signals while the rest is imported

# isort: split
import argparse
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from open_instruct.command_line import OneLineArgumentParser, at_least, seed
from open_instruct.data import lines, reading, shards, splits
from open_instruct.data.kinds import COMPRESSION, file_kind, is_table
from open_instruct.data.texts import plain
from open_instruct.data.to_json import check_types, to_lines
from open_instruct.errors import InputError, exit_code, input_faults
from open_instruct.files import AtomicFile, check_output, followed_by, sha256, write_json

DEFAULT_SIZES = (9000, 90000)


@dataclass(frozen=True)
class Table:
    """A file as numbered rows."""

    path: Path
    kind: str  # "json lines", "json array" or "table"
    num_rows: int
    values: list[str] | None  # the counted column's value in each row, where a column is counted
    sha256: str
    spans: np.ndarray | None = None  # JSON Lines: byte offsets of the rows, [N, 2] start and end


def permutation(num_rows: int, seed: int) -> np.ndarray:
    """Return a random order of the rows, from the Mersenne Twister, whose `random()` Python promises not to change."""
    rng = random.Random(seed)
    return np.argsort(np.array([rng.random() for _ in range(num_rows)]), kind="stable")


def nested_subsets(
    num_rows: int, sizes: Sequence[int], seed: int, values: Sequence[str] | None = None
) -> dict[int, np.ndarray]:
    """Draw row numbers for each size: uniform without replacement, each smaller set part of each larger one.

    Args:
        num_rows: rows to draw from.
        sizes: rows of each subset.
        seed: decides the draw.
        values: for a stratified draw, each row's stratum; its share is kept, rounded by largest remainder.

    Returns:
        Size → row numbers in drawn order.

    Raises:
        InputError: a size is larger than the number of rows.
    """
    too_many = [size for size in sizes if size > num_rows]
    if too_many:
        raise InputError(f"{too_many[0]:,} rows were requested, but there are only {num_rows:,}: request fewer")
    order = permutation(num_rows, seed)
    if values is None:
        return {size: order[:size] for size in sizes}
    names = {name: number for number, name in enumerate(sorted(set(values)))}
    strata = np.fromiter((names[value] for value in values), np.int64, num_rows)
    totals = np.bincount(strata, minlength=len(names))
    # Sorted by stratum and then as drawn, all at once: a pass for each of a million strata would take days.
    by_stratum = np.split(order[np.argsort(strata[order], kind="stable")], np.cumsum(totals)[:-1])
    rank = np.empty(num_rows, np.int64)
    rank[order] = np.arange(num_rows)
    subsets, bound = {}, totals
    for size in sorted(sizes, reverse=True):
        bound = allocate(totals, size, bound)
        chosen = np.concatenate([rows[:count] for rows, count in zip(by_stratum, bound, strict=True)])
        subsets[size] = chosen[np.argsort(rank[chosen], kind="stable")]
    return {size: subsets[size] for size in sizes}


def allocate(totals: np.ndarray, size: int, bound: np.ndarray) -> np.ndarray:
    """Share out `size` rows in proportion to `totals` by largest remainder, to none more than its `bound`.

    The bound is the next larger subset's allocation: largest remainders alone can give a stratum one row more in a
    smaller subset than in a larger one (the Alabama paradox), which would break nesting.
    """
    exact = totals * size  # in units of 1 / totals.sum(): whole numbers, so no rounding differs between machines
    counts, remainders = np.divmod(exact, totals.sum())
    counts = np.minimum(counts, bound)
    order = np.lexsort((np.arange(len(totals)), -remainders))
    while (missing := size - int(counts.sum())) > 0:
        counts[order[counts[order] < bound[order]][:missing]] += 1
    return counts


def row_kind(path: Path) -> str:
    """Return "json lines", "json array" or "table".

    Raises:
        InputError: the file can't be data, or is compressed.
    """
    kind = file_kind(path)
    if path.suffix in COMPRESSION:
        raise InputError(f"{path} is compressed: decompress it first, as its rows are copied by their position")
    return "table" if is_table(path, kind) else kind


def open_table(path: Path, column: str | None) -> Table:
    """Count the rows and read the wanted column, in one pass.

    Raises:
        InputError: the file can't be read, or a row of it; or there is no such column.
    """
    kind = row_kind(path)
    if kind == "table":
        shard = shards.open_shard(path)
        check_types(shard.schema, shard.schema.names, dates=True)
        values = arrow_values(shard, column) if column else None
        return Table(path, kind, shard.num_rows, values, sha256(path))
    if kind == "json array":
        texts: list[str] | None = [] if column else None
        num_rows = 0
        for num_rows, row in enumerate(lines.array_rows(path), start=1):
            lines.as_row(f"{path} row {num_rows}", row)
            if texts is not None and column is not None:
                texts.append(lines.text_of(row, column, path, num_rows - 1))
        return Table(path, kind, num_rows, texts, sha256(path))
    spans, texts, digest = lines.index_lines(path, column)
    return Table(path, kind, len(spans), texts, digest, spans)


def default_column(path: Path) -> str | None:
    """Return `source` if the first row has such a column, else None."""
    kind = row_kind(path)
    names: Container[str]
    if kind == "table":
        names = shards.open_shard(path).schema.names
    elif kind == "json array":
        names = next((row for _, row in reading.read_json_array(path)), {})
    else:
        names = next((row for _, row in reading.read_json_lines(path)), {})
    return "source" if "source" in names else None


def arrow_values(shard: shards.Shard, column: str) -> list[str]:
    """Return a column of an Arrow or Parquet file as text."""
    if column not in shard.schema.names:
        raise InputError(f"{shard.path} has no column {column}: there are {plain(', '.join(shard.schema.names))}")
    with shards.damages(shard.path):
        return [str(value) for batch in shard.batches() for value in batch.column(column).to_pylist()]


def rows_of(table: Table, indices: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Yield the chosen rows as (row number, line), in ascending order."""
    ascending = np.sort(indices)
    if table.kind == "json lines":
        assert table.spans is not None
        chosen = lines.lines_at(table.path, table.spans, ascending)
        for number, line in zip(ascending.tolist(), chosen, strict=True):
            yield number, checked_line(line, table.path, number)
    elif table.kind == "json array":
        wanted = set(ascending.tolist())
        for number, row in enumerate(lines.array_rows(table.path)):
            if number in wanted:
                with input_faults(f"{table.path} row {number + 1}", "a subset could not hold it: repair the row"):
                    line = json.dumps(row, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
                yield number, line + b"\n"
    else:
        first = 0  # number of the batch's first row
        for batch in shards.open_shard(table.path).batches():
            inside = ascending[(ascending >= first) & (ascending < first + batch.num_rows)]
            if len(inside):
                text = to_lines(batch.take(pa.array(inside - first)), f"{table.path} from row {first + 1}")
                # A line break inside a value is escaped, so each one ends a row.
                yield from zip(inside.tolist(), text.splitlines(keepends=True), strict=True)
            first += batch.num_rows


def parsed_rows(table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all rows as (source, row), as they would be written."""
    if table.kind == "json array":
        for number, row in enumerate(lines.array_rows(table.path), start=1):
            yield f"{table.path} row {number}", row
        return
    everything = np.arange(table.num_rows)
    all_lines = rows_of(table, everything)
    if table.kind == "json lines":
        assert table.spans is not None
        all_lines = enumerate(lines.lines_at(table.path, table.spans, everything))
    for number, line in all_lines:
        source = f"{table.path} row {number + 1}"
        yield source, lines.parse_line(source, line)


def checked_line(line: bytes, path: Path, number: int) -> bytes:
    """Return a line as it is, if it is a JSON object; so no subset holds a row that can't be read.

    Raises:
        InputError: it is malformed.
    """
    lines.parse_line(f"{path} row {number + 1}", line)
    return line


def write_subset(table: Table, indices: np.ndarray, output: Path, shuffled: bool) -> AtomicFile:
    """Write the chosen rows, in the file's order or as drawn."""
    with AtomicFile(output) as file:
        if shuffled and table.kind == "json lines":
            assert table.spans is not None
            chosen = lines.lines_at(table.path, table.spans, indices)
            for number, line in zip(indices.tolist(), chosen, strict=True):
                file.write(checked_line(line, table.path, number))
        elif shuffled:  # the subset, never the file, is held in memory
            by_number = dict(rows_of(table, indices))
            for index in indices.tolist():
                file.write(by_number[index])
        else:
            for _, line in rows_of(table, indices):
                file.write(line)
    return file


def run(a: argparse.Namespace) -> None:
    """Index the rows, draw, write the subsets, record them."""
    started = time.perf_counter()
    column = a.stratify or a.count or default_column(a.file)
    shares = splits.parse_shares(a.splits) if a.splits else {}
    sizes = [] if shares else sorted(set(a.sizes or DEFAULT_SIZES))
    names, kind = [*shares, *map(short, sizes)], "splits" if shares else "subsets"
    outputs = {name: a.output_dir / f"{a.file.name.split('.')[0]}_{name}.jsonl" for name in names}
    stem = a.output_dir / f"{a.file.name.split('.')[0]}_{kind}"
    manifest_path, picture = stem.with_name(f"{stem.name}.manifest.json"), stem.with_name(f"{stem.name}.png")
    for path in (*outputs.values(), manifest_path, picture):  # the manifest of other sizes would lose their hashes
        check_output(path, [a.file], a.overwrite)
    table = open_table(a.file, column)
    if table.num_rows == 0:
        raise InputError(f"{a.file} holds no row: there is nothing to draw from")
    if shares:
        with tqdm(parsed_rows(table), "splitting", table.num_rows, unit=" rows", disable=None, delay=2) as rows:
            drawn = splits.draw_splits(rows, shares, a.seed)
    else:
        subsets = nested_subsets(table.num_rows, sizes, a.seed, table.values if a.stratify else None)
        drawn = {short(size): subsets[size] for size in sizes}
    records, counts = [], {}
    if table.values is not None:
        counts["input"] = Counter(table.values)
    with followed_by(manifest_path) as finished:
        for name, path in reversed(outputs.items()):  # the largest first: a bad row is met before a file is complete
            file = write_subset(table, drawn[name], path, a.order == "shuffled")
            finished.append(path)
            kept = np.sort(drawn[name]).astype("<i8")
            records.append({"path": str(path), "rows": len(kept), "bytes": file.num_bytes, "sha256": file.sha256,
                            "indices_sha256": hashlib.sha256(kept.tobytes()).hexdigest()})  # fmt: skip
            if shares:
                records[-1] |= {"name": name, "share": float(shares[name])}
            if table.values is not None:
                counts[name] = Counter(table.values[index] for index in kept)
                records[-1]["counts"] = dict(counts[name].most_common())
            print(f"{len(kept):,} rows → {path}")
        manifest = {
            "input": {
                "path": str(a.file),
                "rows": table.num_rows,
                "bytes": a.file.stat().st_size,
                "sha256": table.sha256,
            },
            "seed": a.seed,
            "stratify": a.stratify,
            "order": a.order,
            kind: records[::-1],
            "column": column,
            "counts": dict(counts["input"].most_common()) if counts else None,
        }
        write_json(manifest_path, manifest)
    if counts:
        from open_instruct.report import pictures, plots  # matplotlib: not for --help, nor before the file is read

        counts = {name: counts[name] for name in ["input", *outputs]}
        print(histogram(counts))
        with pictures.if_possible(picture):
            plots.plot_sources(counts, f"{column} of {a.file.name}", picture)
    print(f"drawn from {table.num_rows:,} rows in {time.perf_counter() - started:.1f} s")


def short(size: int) -> str:
    """Return a size as it stands in file names: 9000 as 9k, 950 as 950."""
    return f"{size // 1000}k" if size % 1000 == 0 else str(size)


def histogram(counts: dict[str, Counter[str]], max_values: int = 30) -> str:
    """Return a table of each value's share, input against subsets, with a bar for the input.

    Args:
        counts: for "input" and each subset, the number of rows with each value.
        max_values: most frequent values that get a line.
    """
    totals = {name: sum(counter.values()) for name, counter in counts.items()}
    values = [value for value, _ in counts["input"].most_common(max_values)]
    width = max(len(plain(name)) for name in [*values, "input"])
    rows = [" ".join([" " * width, *(f"{name:>8}" for name in counts)])]
    for value in values:
        shares = [counter[value] / totals[name] for name, counter in counts.items()]
        rows.append(
            " ".join([f"{plain(value):<{width}}", *(f"{share:>8.2%}" for share in shares), "█" * round(40 * shares[0])])
        )
    if len(counts["input"]) > max_values:
        rows.append(f"… and {len(counts['input']) - max_values} more")
    return "\n".join(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON Lines, JSON array, Arrow or Parquet")
    parser.add_argument(
        "--sizes", type=at_least(1), nargs="+", metavar="N", help="rows of each subset (default 9000 90000)"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME=SHARE",
        help="instead of subsets: disjoint splits whose shares sum to 1, by a hash of each conversation",
    )
    parser.add_argument("--seed", type=seed, default=42, help="seed of the draw (default 42)")
    parser.add_argument("--stratify", metavar="COLUMN", help="keep each value's share of this column")
    parser.add_argument("--count", metavar="COLUMN", help="column to count (default: source, where there is one)")
    parser.add_argument(
        "--order", choices=["original", "shuffled"], default="original", help="order of the rows (default original)"
    )
    parser.add_argument("-o", "--output_dir", type=Path, help="folder of the subsets (default: the file's)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing subsets")
    a = parser.parse_args(argv)
    exact = {"--sizes": a.sizes, "--stratify": a.stratify, "--order shuffled": a.order == "shuffled"}
    given = [name for name, value in exact.items() if value]
    if a.splits and given:
        parser.error(
            f"{' and '.join(given)}: splits take all rows in their order, each on the side that its hash says: remove "
            "it, or --splits (--count COLUMN counts a column's values in each split)"
        )
    a.output_dir = a.output_dir or a.file.parent
    return a


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code: 0, 2 after wrong input, 130 after an interrupt."""
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    open_instruct.interrupts.end_process(main())
