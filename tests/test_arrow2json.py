"""Conversion: every row survives, the output is whole or absent, and what can't be converted is named."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrow2json import main
from tests.conftest import ROOT

AWKWARD = [
    "",
    "plain",
    "\u2028line\u2029",
    "nul\x00",
    'quote" back\\slash',
    "漢字 ☂ é",
    "😀" * 3,
    "\n\r\t",
    "x" * 100_000,
]
ROWS = [
    {
        "id": f"r{i}",
        "messages": [{"content": text, "role": "user"}, {"content": "ok", "role": "assistant"}],
        "source": f"s{i % 3}",
    }
    for i, text in enumerate(AWKWARD * 30)
]
TABLE = pa.Table.from_pylist(ROWS)


def write_stream(path, table=TABLE):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return path


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def source(tmp_path):
    return write_stream(tmp_path / "train.arrow")


def make_source(kind, tmp_path):
    if kind == "stream":
        return write_stream(tmp_path / "t.arrow")
    if kind == "feather":
        pyarrow.feather.write_feather(TABLE, tmp_path / "t.feather", compression="uncompressed")
        return tmp_path / "t.feather"
    if kind == "parquet":
        pyarrow.parquet.write_table(TABLE, tmp_path / "t.parquet", row_group_size=70)
        return tmp_path / "t.parquet"
    if kind == "saved":
        datasets.Dataset(TABLE).save_to_disk(tmp_path / "saved", num_shards=3)
        return tmp_path / "saved"
    if kind == "saved dict":
        datasets.DatasetDict(train=datasets.Dataset(TABLE), test=datasets.Dataset(TABLE.slice(0, 2))).save_to_disk(
            tmp_path / "saved"
        )
        return tmp_path / "saved"
    if kind == "cache":
        folder = tmp_path / "org___name" / "default" / "0.0.0" / "abc"
        folder.mkdir(parents=True)
        for i in range(3):
            write_stream(folder / f"name-train-{i:05d}-of-00003.arrow", TABLE.slice(i * 90, 90))
        write_stream(folder / "cache-1234.arrow", TABLE.slice(0, 5))
        write_stream(folder / "name-test.arrow", TABLE.slice(0, 5))
        return tmp_path / "org___name"
    snapshot = tmp_path / "datasets--org--name"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("c0ffee")
    (snapshot / "snapshots" / "c0ffee" / "data").mkdir(parents=True)
    for i in range(2):
        pyarrow.parquet.write_table(
            TABLE.slice(i * 135, 135), snapshot / "snapshots" / "c0ffee" / "data" / f"train-{i:05d}-of-00002.parquet"
        )
    return snapshot


@pytest.mark.parametrize("kind", ["stream", "feather", "parquet", "saved", "saved dict", "cache", "snapshot"])
def test_every_source_gives_every_row_in_order(kind, tmp_path):
    output = tmp_path / "out" / "train.jsonl"
    assert main([str(make_source(kind, tmp_path)), "-o", str(output), "--verify"]) == 0
    assert rows_in(output) == ROWS
    manifest = json.loads((tmp_path / "out" / "train.jsonl.manifest.json").read_text())
    assert manifest["rows"] == len(ROWS) and manifest["bytes"] == output.stat().st_size
    import hashlib

    assert manifest["files"][0]["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert sorted(path.name for path in output.parent.iterdir()) == ["train.jsonl", "train.jsonl.manifest.json"]


def test_a_glob_takes_shards_in_natural_order(tmp_path):
    for i in (1, 2, 10):
        write_stream(tmp_path / f"part-{i}.arrow", TABLE.slice(i, 1))
    assert main([str(tmp_path / "part-*.arrow"), "-o", str(tmp_path / "o.jsonl")]) == 0
    assert [row["id"] for row in rows_in(tmp_path / "o.jsonl")] == ["r1", "r2", "r10"]


def test_one_json_array(source, tmp_path):
    assert main([str(source), "-o", str(tmp_path / "o.json"), "--format", "json", "--verify"]) == 0
    assert json.loads((tmp_path / "o.json").read_text()) == ROWS


def test_columns_shards_and_compression(source, tmp_path):
    words = [
        str(source),
        "-o",
        str(tmp_path / "o.jsonl"),
        "--columns",
        "source",
        "id",
        "--shards",
        "4",
        "--compression",
        "gzip",
        "--verify",
    ]
    assert main(words) == 0
    lines = [
        line
        for i in range(4)
        for line in gzip.decompress((tmp_path / f"o-{i:05d}-of-00004.jsonl.gz").read_bytes()).splitlines()
    ]
    assert [json.loads(line) for line in lines] == [{"source": row["source"], "id": row["id"]} for row in ROWS]
    assert main([str(source), "-o", str(tmp_path / "z.jsonl"), "--compression", "zstd", "--verify"]) == 0


def test_a_changed_output_fails_verification(source, tmp_path, monkeypatch, capsys):
    """Negative control of --verify."""
    import arrow2json

    real = arrow2json.to_lines
    monkeypatch.setattr(arrow2json, "to_lines", lambda batch, source: real(batch, source).replace(b'"ok"', b'"OK"', 1))
    assert main([str(source), "-o", str(tmp_path / "o.jsonl"), "--verify"]) == 2
    assert "row 0 differs" in capsys.readouterr().err


JSON_TYPES = st.deferred(lambda: st.sampled_from([pa.string(), pa.int64(), pa.int8(), pa.bool_(), pa.float64()]))
VALUES = {
    pa.string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int8(): st.integers(-128, 127),
    pa.bool_(): st.booleans(),
    pa.float64(): st.floats(allow_nan=False, allow_infinity=False),
}


@st.composite
def tables(draw):
    """Tables of one to four columns: plain, lists, and lists of structs, with nulls."""
    count = draw(st.integers(1, 6))
    columns, fields = [], []
    for index in range(draw(st.integers(1, 4))):
        kind = draw(JSON_TYPES)
        value = st.none() | VALUES[kind]
        shape = draw(st.sampled_from(["plain", "list", "structs"]))
        if shape == "list":
            kind, value = pa.list_(kind), st.none() | st.lists(value, max_size=3)
        elif shape == "structs":
            kind, value = (
                pa.list_(pa.struct([("a", kind), ("b", pa.string())])),
                st.lists(st.fixed_dictionaries({"a": value, "b": VALUES[pa.string()]}), max_size=3),
            )
        fields.append(pa.field(f"c{index}", kind))
        columns.append(pa.array(draw(st.lists(value, min_size=count, max_size=count)), kind))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_arrow_to_json_to_arrow_is_equal(table, tmp_path):
    source, output = write_stream(tmp_path / "p.arrow", table), tmp_path / "p.jsonl"
    assert main([str(source), "-o", str(output), "--overwrite"]) == 0
    assert pa.Table.from_pylist(rows_in(output), schema=table.schema).equals(table)


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def bad_source(case, tmp_path):
    """Arguments that must fail."""
    stream = write_stream(tmp_path / "train-00000-of-00002.arrow")
    if case == "truncated":
        return [str(truncate(stream, 0.6))]
    if case == "no end mark":
        stream.write_bytes(stream.read_bytes()[:-8])
        return [str(stream)]
    if case == "truncated parquet":
        pyarrow.parquet.write_table(TABLE, tmp_path / "t.parquet")
        return [str(truncate(tmp_path / "t.parquet", 0.5))]
    if case == "missing shard":
        return [str(tmp_path)]
    if case == "schemas":
        other = write_stream(tmp_path / "other.arrow", TABLE.drop_columns(["source"]))
        return [str(stream), str(other)]
    if case == "zero rows":
        return [str(write_stream(tmp_path / "empty.arrow", TABLE.slice(0, 0)))]
    if case == "not utf-8":
        text = pa.array([b"good", b"\xff\xfe bad"]).cast(pa.binary())
        wrong = pa.StringArray.from_buffers(2, text.buffers()[1], text.buffers()[2])
        return [str(write_stream(tmp_path / "wrong.arrow", pa.table({"id": wrong})))]
    if case == "nan":
        return [str(write_stream(tmp_path / "nan.arrow", pa.table({"x": [1.0, float("nan")]})))]
    if case == "binary":
        return [str(write_stream(tmp_path / "binary.arrow", pa.table({"x": pa.array([b"x"])})))]
    if case == "column twice":
        return [str(stream), "--columns", "id", "id"]
    if case == "columns of one name":
        return [str(write_stream(tmp_path / "two.arrow", pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])))]
    if case == "fields of one name":
        fields = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
        return [str(write_stream(tmp_path / "two.arrow", pa.table({"s": fields})))]
    if case == "empty":
        return [""]
    if case == "offsets":
        small = write_stream(tmp_path / "small.arrow", pa.table({"a": ["hello"]}))
        data = small.read_bytes()
        at = data.rindex((0).to_bytes(4, "little") + (5).to_bytes(4, "little"))
        small.write_bytes(data[: at + 4] + (-7).to_bytes(4, "little", signed=True) + data[at + 8 :])
        return [str(small)]
    if case == "no column":
        return [str(stream), "--columns", "nope"]
    if case == "many shards":
        return [str(stream), "--shards", "1000"]
    if case == "same file":
        return [str(stream), "-o", str(stream), "--overwrite"]
    if case == "exists":
        (tmp_path / "out.jsonl").write_text("precious")
        return [str(stream)]
    if case == "text":
        (tmp_path / "a.txt").write_text("hello there")
        return [str(tmp_path / "a.txt")]
    if case == "flag":
        return [str(stream), "--nonsense"]
    if case == "count":
        return [str(stream), "--shards", "0"]
    return [str(tmp_path / "nowhere.arrow")]


CASES = {
    "truncated": "truncated",
    "no end mark": "truncated",
    "truncated parquet": "truncated or damaged",
    "missing shard": "1 of 2 shards are missing",
    "schemas": "different columns",
    "zero rows": "holds no row",
    "not utf-8": "column id of row 1 of these can't be used (byte 0 is not UTF-8)",
    "nan": "NaN or an infinity",
    "binary": "can't hold the columns x (binary)",
    "column twice": "column 'id' stands there twice",
    "columns of one name": "column 'a' stands there twice",
    "fields of one name": "can't hold the columns s",
    "empty": "is empty: give a value",
    "offsets": "truncated or damaged",
    "no column": "no column nope: there are id, messages, source",
    "many shards": "--shards 1000 is more than the 270 rows",
    "same file": "is one of the inputs",
    "exists": "pass --overwrite",
    "text": "neither Arrow nor Parquet",
    "flag": "unrecognized arguments: --nonsense",
    "count": "0 is not a whole number of at least 1",
    "nowhere": "no such file or folder",
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    words = bad_source(case, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    try:
        code = main([*words, *([] if "-o" in words else ["-o", str(tmp_path / "out.jsonl")])])
    except SystemExit as end:  # of the argument parser
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and CASES[case] in error, error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("more", [[], ["--shards", "2"], ["--compression", "gzip"]], ids=str)
@pytest.mark.parametrize("name", ["", ".", "..", "/", "sub/.."])
def test_an_output_without_a_name_is_one_line(name, more, tmp_path, capsys, monkeypatch):
    source = write_stream(tmp_path / "t.arrow")
    monkeypatch.chdir(tmp_path)
    assert main([str(source), "-o", name, *more]) == 2
    error = capsys.readouterr().err
    assert "is a folder: name a file" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.arrow"]


def test_no_space_left_removes_the_partial_file_and_says_how_much_is_needed(tmp_path):
    """A real limit of the operating system: files of this process may not grow beyond 200 kB."""
    source = write_stream(tmp_path / "t.arrow")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    result = subprocess.run(
        [sys.executable, str(ROOT / "arrow2json.py"), str(source), "-o", str(tmp_path / "o.jsonl")],
        preexec_fn=limit, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 2 and "no space left" in result.stderr and "MB are needed" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.arrow"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing_half_written(tmp_path, number):
    big = pa.table({"text": ["word " * 20_000] * 3000})
    source = write_stream(tmp_path / "t.arrow", big)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "arrow2json.py"), str(source), "-o", str(tmp_path / "o.jsonl"),
         "--compression", "gzip"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not list(tmp_path.glob(".o.jsonl*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["t.arrow"]


@pytest.mark.parametrize("script", ["arrow2json.py", "sample_subsets.py"])
def test_the_tools_start_anywhere_and_load_nothing_heavy_for_their_help(script, tmp_path):
    """From any folder, without an installed package. Transformers may come with the argument parser's module."""
    code = (
        f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path('{ROOT / script}', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([name for name in ('datasets', 'matplotlib', 'peft', 'wandb') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_values_of_every_exact_type_are_verified(tmp_path):
    table = pa.table(
        {
            "": pa.array(["no name", None]),
            "float32": pa.array([0.1, 1e-45], pa.float32()),
            "nested": pa.array([[{"x": 0.1}], []], pa.list_(pa.struct([("x", pa.float32())]))),
            "big": pa.array([2**64 - 1, 0], pa.uint64()),
            "view": pa.array(["é", ""], pa.string_view()),
            "pairs": pa.array([[1, 2], [3, 4]], pa.list_(pa.int8(), 2)),
            "category": pa.array(["a", "b"]).dictionary_encode(),
            "nothing": pa.nulls(2),
        }
    )
    source = write_stream(tmp_path / "t.arrow", table)
    assert main([str(source), "-o", str(tmp_path / "o.jsonl"), "--verify"]) == 0
    rows = rows_in(tmp_path / "o.jsonl")
    assert list(rows[0]) == table.column_names and rows[0]["float32"] == 0.1 and rows[0]["big"] == 2**64 - 1
    assert [row["category"] for row in rows] == ["a", "b"] and rows[0]["nested"] == [{"x": 0.1}]


def test_a_changed_float32_fails_verification(tmp_path, monkeypatch, capsys):
    """Negative control of the comparison in the column's own precision."""
    import arrow2json

    source = write_stream(tmp_path / "t.arrow", pa.table({"x": pa.array([0.1], pa.float32())}))
    real = arrow2json.to_lines
    monkeypatch.setattr(arrow2json, "to_lines", lambda batch, source: real(batch, source).replace(b"0.1", b"0.10001"))
    assert main([str(source), "-o", str(tmp_path / "o.jsonl"), "--verify"]) == 2
    assert "row 0 differs" in capsys.readouterr().err
