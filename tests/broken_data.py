"""Broken data files, by seed, given to the readers and the data tools in forked processes.

    python -m tests.broken_data --first 0 --draws 300

Each draw must end with the rows, or with one line that says what is wrong: no crash of the process, no traceback, no
hang; and whatever a tool writes must be JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import decimal
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

import arrow2json
import sample_subsets
from open_instruct.data import reading, shards
from open_instruct.data.bad_rows import BadRows
from open_instruct.errors import InputError
from tests.hostile.mutations import mutated_bytes, mutated_json

SECONDS = 30  # for one draw; a good one takes hundredths
MEMORY = 4 << 30  # bytes of address space beyond the parent's
BATCH = 25  # draws of one process
TALK = [{"role": "user", "content": "what? é"}, {"role": "assistant", "content": "that"}]
FORMS = [
    {"id": "r", "messages": TALK},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, TALK[1]], "n": 1.5},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"prompt": "q", "completion": "a"},
    {"prompt": TALK[:1], "completion": TALK[1:]},
    {"instruction": "q", "input": "i", "output": "a"},
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"]
FRAMES = ["{rows}", "[{list}]", "[{list}]x", "[{rows}]", "[{list}", "{list}", "[{list},]", "\ufeff{rows}", "{rows}\n\n"]
NAMES = ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.zst", "rows.arrow", "rows.parquet", "rows.csv", "rows"]


def tables() -> list[pa.Table]:
    """Small tables of every kind of type: conversations first."""
    rows = [{"id": f"r{i}", "messages": TALK[: 1 + i % 2], "n": i, "f": i / 3, "ok": i % 2 == 0} for i in range(12)]
    plain = pa.Table.from_pylist([{**row, "messages": TALK} for row in rows])
    ids, twelve = plain["id"], list(range(12))
    kinds, offsets = pa.array([0, 1] * 6, pa.int8()), pa.array([i // 2 for i in twelve], pa.int32())
    dense = pa.UnionArray.from_dense(kinds, offsets, [pa.array(list("abcdef")), pa.array(twelve[:6])])
    return [
        plain,
        pa.Table.from_pylist(rows),
        plain.append_column("source", ids.dictionary_encode()),
        pa.table({"messages": plain["messages"].cast(pa.large_list(plain["messages"].type.value_type))}),
        pa.table({"id": ids.cast(pa.string_view()), "v": pa.array([["a"], None, []] * 4, pa.list_view(pa.string()))}),
        pa.table({"r": pa.RunEndEncodedArray.from_arrays(pa.array([3, 12], pa.int32()), pa.array(["x", "y"]))}),
        pa.table({"u": dense, "id": ids}),
        pa.table({"m": pa.array([[("a", 1)], [], None] * 4, pa.map_(pa.string(), pa.int64())), "b": [b"x"] * 12}),
        pa.table({"l": pa.array([["a", "b"]] * 12, pa.list_(pa.string(), 2)), "d": [decimal.Decimal("1.1")] * 12}),
        pa.table({"t": pa.array([1] * 12, pa.timestamp("us", "UTC")), "e": pa.nulls(12), "s": [{}] * 12}),
        pa.table({"f": pa.array([0.1] * 12, pa.float32()), "u": pa.array([2**64 - 1] * 12, pa.uint64())}),
        pa.table({"j": pa.array(["{}"] * 12, pa.json_(pa.utf8())), "prompt": ["q"] * 12, "completion": ["a"] * 12}),
    ]


def table_bytes(rng: random.Random, table: pa.Table) -> tuple[str, bytes]:
    """A name and the bytes of a table in one of its formats."""
    sink, kind = io.BytesIO(), rng.choice(["stream", "stream", "file", "parquet"])
    if kind == "parquet":
        with contextlib.suppress(pa.ArrowNotImplementedError):  # of unions and run-end encoding
            pyarrow.parquet.write_table(table, sink, compression=rng.choice(["none", "zstd", "snappy"]))
            return "rows.parquet", sink.getvalue()
        sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, None, "lz4", "zstd"]))
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=5)
    return "rows.arrow", sink.getvalue()


def broken_table(rng: random.Random, folder: Path) -> Path:
    """An Arrow or Parquet file with one to eight changes of its bytes."""
    name, data = table_bytes(rng, rng.choice(tables()))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
        data = mutated_bytes(rng, data)
    (folder / name).write_bytes(data)
    return folder / name


def broken_text(rng: random.Random, folder: Path) -> Path:
    """Rows as text: values, frames, encodings, compression and names that don't fit."""
    rows = [json.dumps(rng.choice(FORMS)) for _ in range(rng.choice([1, 3, 8]))]
    for _ in range(rng.choice([0, 1, 1, 2])):
        at = rng.randrange(len(rows))
        with contextlib.suppress(ValueError, RecursionError):  # it was changed before, and is no JSON now
            rows[at] = mutated_json(rng, json.loads(rows[at]))
    if rng.random() < 0.1:
        rows[0] = rows[0].replace("{", '{"messages": 1, ', 1)
    frame = rng.choice(FRAMES[:2]) if rng.random() < 0.7 else rng.choice(FRAMES)
    text = frame.replace("{rows}", rng.choice(["\n", "\n", "\r\n", "\r"]).join(rows)).replace("{list}", ", ".join(rows))
    data = text.encode(rng.choice(ENCODINGS) if rng.random() < 0.1 else "utf-8", "replace")
    path = folder / (rng.choice(NAMES[:4]) if rng.random() < 0.8 else rng.choice(NAMES))
    if path.suffix == ".gz" or rng.random() < 0.05:
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    if rng.random() < 0.3:
        data = mutated_bytes(rng, data)
    path.write_bytes(data)
    return path


def broken_folder(rng: random.Random, folder: Path) -> Path:
    """A folder of `save_to_disk`, or of files of this project's tools, of which one is changed."""
    saved = folder / "saved"
    saved.mkdir()
    name, data = table_bytes(rng, tables()[0])
    (saved / name).write_bytes(data)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": "train"}))
    (saved / "dataset_info.json").write_text("{}")
    if rng.random() < 0.4:
        (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
        shutil.copytree(saved, saved / "train")
    if rng.random() < 0.3:
        row = json.dumps(FORMS[0]) + "\n"
        for item in saved.glob("*.json"):
            item.unlink()
        (saved / "a.jsonl").write_text(3 * row)
        (saved / "a_1.jsonl").write_text(row)
        record = {"input": {"path": "a.jsonl"}, "subsets": [{"path": "a_1.jsonl"}]}
        (saved / "a_subsets.manifest.json").write_text(json.dumps(record))
    path = rng.choice([item for item in sorted(saved.rglob("*")) if item.is_file()])
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(mutated_json(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(mutated_bytes(rng, path.read_bytes()))
    return saved


def broken_place(rng: random.Random, folder: Path) -> Path:
    """A pipe, a link to nothing, a folder, or nothing at all."""
    path = folder / rng.choice(NAMES)
    rng.choice([lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path), lambda: None])()
    return rng.choice([path, path, Path("/dev/zero"), Path("/dev/null")])


def read_rows(source: Path, skip: bool) -> list[object]:
    """The conversations of a source, as training reads them."""
    bad = BadRows(skip)
    rows: list[object] = list(reading.conversations(reading.read_files(reading.files_of(str(source)), bad), bad=bad))
    bad.check()
    return rows


def check_tool(main: Callable[[list[str]], int], words: list[str], folder: Path) -> str | None:
    """What is wrong with how a tool ended, or None."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    lines = err.getvalue().splitlines()
    if code == 2:
        return None if len(lines) == 1 and lines[0].startswith("error: ") else f"{words} said {lines[:5]}"
    if code != 0:
        return f"{words} ended with {code}: {lines[:5]}"
    for path in folder.glob("out*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            if not isinstance(json.loads(line), dict):
                return f"{words} wrote {line[:80]!r}"
    return None


def try_draw(seed: int, folder: Path) -> str | None:
    """Make the broken file of a seed and read it in every way; what went wrong, or None."""
    rng = random.Random(seed)
    kinds = [broken_table] * 5 + [broken_text] * 5 + [broken_folder] * 2 + [broken_place]
    source = rng.choice(kinds)(rng, folder)
    for skip in (False, True):
        try:
            read_rows(source, skip)
        except InputError as error:
            if ": " not in str(error):
                return f"no remedy: {error}"
    output = folder / "out"
    output.mkdir()
    if problem := check_tool(
        arrow2json.main, [str(source), "-o", str(output / "out.jsonl"), "--verify", "--overwrite"], output
    ):
        return problem
    if source.suffix and not source.is_dir():
        shutil.rmtree(output)
        return check_tool(sample_subsets.main, [str(source), "--sizes", "1", "3", "-o", str(output)], output)
    return None


def try_seeds(first: int, draws: int, checks: bool) -> list[str]:
    """Try seeds in forked processes; returns a line for each that went wrong."""
    wrong, done = [], 0
    while done < draws:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(range(first + done, first + min(done + BATCH, draws)), writer, checks)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as results:
            lines = results.read().splitlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        begun = [int(line.split()[1]) for line in lines if line.startswith("begin")]
        wrong += [line for line in lines if line.startswith("wrong")]
        if status != 0 or not begun:
            wrong.append(f"wrong {begun[-1] if begun else first + done}: the process ended with {status}")
        done = begun[-1] - first + 1 if begun else done + 1
    return wrong


def _work(seeds: range, writer: int, checks: bool) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not checks:
        shards.check_batch = lambda batch: None
    with os.fdopen(writer, "w", encoding="utf-8", buffering=1) as results:
        for seed in seeds:
            print("begin", seed, file=results)
            signal.alarm(SECONDS)
            with tempfile.TemporaryDirectory() as name:
                try:
                    problem = try_draw(seed, Path(name))
                except BaseException:
                    problem = traceback.format_exc()
            if problem:
                print(f"wrong {seed}: {' ⏎ '.join(problem.splitlines())[-1500:]}", file=results)


def main() -> int:
    """Try a range of seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--without_checks", action="store_true", help="don't check record batches: a control")
    args = parser.parse_args()
    wrong = try_seeds(args.first, args.draws, not args.without_checks)
    print(*wrong, f"{len(wrong)} of {args.draws} draws went wrong", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
