"""Subsets: exact sizes, nested, the same bytes from every format and on every machine, shares kept where requested."""

import hashlib
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_instruct.errors import InputError
from sample_subsets import allocate, main, nested_subsets

ROWS = [
    {
        "id": f"r{i}",
        "messages": [{"content": f'text {i} "source": "no" \u2028 é', "role": "source"}],
        "source": f"s{min(i % 7, 4)}",
    }
    for i in range(1000)
]


def write(path, rows=ROWS, kind="lines"):
    if kind == "lines":
        path.write_text("".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows))
    elif kind == "array":
        path.write_text(json.dumps(rows, indent=2))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=130)
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("kind, name", [("lines", "t.jsonl"), ("array", "t.json"), ("parquet", "t.parquet")])
@pytest.mark.parametrize("order", ["original", "shuffled"])
def test_sizes_nesting_and_content(kind, name, order, tmp_path):
    source = write(tmp_path / name, kind=kind)
    assert (
        main(
            [str(source), "--sizes", "90", "300", "1000", "--seed", "1", "--order", order, "-o", str(tmp_path / "out")]
        )
        == 0
    )
    subsets = {size: read(tmp_path / "out" / f"t_{'1k' if size == 1000 else size}.jsonl") for size in (90, 300, 1000)}
    ids = {size: [row["id"] for row in rows] for size, rows in subsets.items()}
    assert all(len(set(ids[size])) == size for size in ids)
    assert set(ids[90]) < set(ids[300]) < set(ids[1000])
    by_id = {row["id"]: row for row in ROWS}
    assert all(row == by_id[row["id"]] for rows in subsets.values() for row in rows)
    in_order = [row["id"] for row in ROWS if row["id"] in set(ids[300])]
    assert (ids[300] == in_order) == (order == "original")
    manifest = json.loads((tmp_path / "out" / "t_subsets.manifest.json").read_text())
    assert (
        manifest["input"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        and manifest["input"]["rows"] == 1000
    )
    record = manifest["subsets"][0]
    assert record["sha256"] == hashlib.sha256((tmp_path / "out" / "t_90.jsonl").read_bytes()).hexdigest()
    assert record["counts"] == dict(Counter(row["source"] for row in subsets[90]).most_common())
    assert (tmp_path / "out" / "t_subsets.png").stat().st_size > 1000


def test_the_draw_is_the_same_on_every_machine():
    """Recorded once; a change of Python, numpy or this code that moves it must be noticed."""
    drawn = nested_subsets(1000, [5], 42)[5].tolist()
    assert drawn == [394, 124, 368, 684, 290], drawn


def test_the_same_bytes_from_every_format(tmp_path):
    digests = set()
    for kind, name in (("lines", "t.jsonl"), ("array", "t.json"), ("parquet", "t.parquet")):
        folder = tmp_path / kind
        folder.mkdir()
        assert main([str(write(folder / name, kind=kind)), "--sizes", "90", "-o", str(folder)]) == 0
        digests.add(hashlib.sha256((folder / "t_90.jsonl").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_another_seed_is_another_draw_and_each_row_is_equally_likely():
    assert set(nested_subsets(1000, [90], 1)[90]) != set(nested_subsets(1000, [90], 2)[90])
    drawn = Counter(int(row) for seed in range(400) for row in nested_subsets(20, [5], seed)[5])
    expected = 400 * 5 / 20
    assert (
        sum((drawn[row] - expected) ** 2 / expected for row in range(20)) < 45
    )  # chi-square, 19 degrees of freedom: p < 0.001


@given(st.lists(st.integers(1, 200), min_size=1, max_size=8), st.data())
def test_strata_keep_their_shares_exactly_to_rounding_and_nest(totals, data):
    values = [f"s{i}" for i, count in enumerate(totals) for _ in range(count)]
    sizes = sorted(data.draw(st.sets(st.integers(1, len(values)), min_size=1, max_size=4)))
    subsets = nested_subsets(len(values), sizes, 3, values)
    for size in sizes:
        assert len(set(subsets[size].tolist())) == size
    for small, large in pairwise(sizes):
        assert set(subsets[small].tolist()) <= set(subsets[large].tolist())
    counts = Counter(values[i] for i in subsets[sizes[-1]])
    for i, total in enumerate(totals):  # the largest subset's shares are bound by nothing
        assert abs(counts[f"s{i}"] - sizes[-1] * total / len(values)) < 1


def test_the_alabama_paradox_does_not_break_nesting():
    """With 6, 6 and 2 seats of 14, a house of 10 gives the third state 2 seats, and one of 11 gives it 1."""
    totals = np.array([6, 6, 2])
    alone = [allocate(totals, size, totals).tolist() for size in (10, 11)]
    assert alone == [[4, 4, 2], [5, 5, 1]]
    assert allocate(totals, 10, np.array([5, 5, 1])).tolist() == [5, 4, 1]


def test_stratified_shares(tmp_path):
    assert main([str(write(tmp_path / "t.jsonl")), "--sizes", "100", "--stratify", "source"]) == 0
    every, part = (Counter(row["source"] for row in rows) for rows in (ROWS, read(tmp_path / "t_100.jsonl")))
    assert all(abs(part[name] - every[name] / 10) < 1 for name in every)


def test_a_file_without_a_source_column_and_with_blank_lines(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"a": 1}\r\n\n{"a": 2}\n   \n{"a": 3}')
    assert main([str(tmp_path / "t.jsonl"), "--sizes", "3"]) == 0
    assert read(tmp_path / "t_3.jsonl") == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert not (tmp_path / "t_subsets.png").exists()


def test_lines_longer_than_a_chunk(tmp_path, monkeypatch):
    from open_instruct.data import lines

    monkeypatch.setattr(lines, "CHUNK_BYTES", 64)
    monkeypatch.setattr(lines, "ARRAY_CHUNK_BYTES", 64)
    for kind, name in (("lines", "t.jsonl"), ("array", "t.json")):
        assert main([str(write(tmp_path / name, ROWS[:50], kind)), "--sizes", "50", "--overwrite"]) == 0
        assert read(tmp_path / "t_50.jsonl") == ROWS[:50]


@pytest.mark.parametrize(
    "content, words, says",
    [
        ("{}\n" * 5, ["--sizes", "9"], "9 rows were requested, but there are only 5"),
        ("", [], "is empty"),
        ('{"a": 1}\n', ["--sizes", "1", "--stratify", "b"], "row 1 has no column b"),
        ('{"a": 1}\n{oops\n', ["--sizes", "1", "--stratify", "a"], "row 2 is malformed JSON"),
        ('[{"a": 1}, {oops]', ["--sizes", "1"], "malformed JSON in row 2"),
        ('[{"a": 1}]garbage', ["--sizes", "1"], "malformed JSON in row 2"),
        ("[{} {} {}]", ["--sizes", "1"], "malformed JSON in row 2"),
        ('[{"a": 1e400}]', ["--sizes", "1"], "Out of range float values are not JSON compliant"),
        ('[{"a": "\\ud800"}]', ["--sizes", "1"], "half of a surrogate pair"),
        ("[1, 2]", ["--sizes", "1", "--stratify", "a"], "row 1 is a number"),
        ('{"a": 1}\n{"a": 2,}\n', ["--sizes", "2"], "malformed JSON"),
        ('{"a": 1}\n{"a": 2} {"a": 3}\n', ["--sizes", "2"], "malformed JSON"),
        ('{"a": 1}\n{"a": 2, "a": 3}\n', ["--sizes", "2"], "the key 'a' stands there twice"),
        ('{"a": 1}\n[1]\n', ["--sizes", "1"], "row 2 is malformed JSON, or no object"),
        ('{"a": 1}\n{"a":', ["--sizes", "1"], "row 2 is malformed JSON, or no object"),
        ('{"a": 1}\n"\x1b[2J"\n', ["--sizes", "1"], "x1b[2J"),
        ("{}\n", ["--sizes", "none"], "none is not a whole number"),
        ("{}\n", ["--size", "1"], "--size"),
        ("{}\n", ["--sizes", "1", "-o", "{folder}", "--exists"], "pass --overwrite"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(content, words, says, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(content)
    if "--exists" in words:
        words = words[:-3]
        (tmp_path / "t_1.jsonl").write_text("precious")
    before = sorted(tmp_path.iterdir())
    try:
        code = main([str(tmp_path / "t.jsonl"), *words])
    except SystemExit as end:  # of the argument parser
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before


def test_too_many_rows_names_how_many_there_are():
    with pytest.raises(InputError, match="only 10"):
        nested_subsets(10, [11], 0)


def test_a_compressed_file_is_refused(tmp_path, capsys):
    with pa.CompressedOutputStream(str(tmp_path / "t.jsonl.gz"), "gzip") as sink:
        sink.write(b"{}\n{}\n")
    assert main([str(tmp_path / "t.jsonl.gz"), "--sizes", "1"]) == 2
    assert "is compressed: decompress it first" in capsys.readouterr().err


def test_numbers_of_an_array_are_copied_as_json_reads_them(tmp_path):
    row = '{"a":0.1,"b":12345678901234567890123,"c":[{"d":1e300,"e":-0.0}],"f":5e-324,"g":1E5}'
    (tmp_path / "t.json").write_text(f"[{row}]")
    assert main([str(tmp_path / "t.json"), "--sizes", "1"]) == 0
    again = json.dumps(json.loads(row), separators=(",", ":")) + "\n"
    assert (tmp_path / "t_1.jsonl").read_text() == again


def test_a_byte_order_mark_is_not_copied(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert main([str(tmp_path / "t.jsonl"), "--sizes", "2"]) == 0
    assert (tmp_path / "t_2.jsonl").read_bytes() == b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("value", ["\x1b[2Jx", "x" * 100_000, "a\nb", "😀"])
def test_any_value_can_be_a_stratum(value, tmp_path, capsys):
    rows = [{"a": i, "source": value if i % 2 else "plain"} for i in range(20)]
    source = write(tmp_path / "t.jsonl", rows)
    assert main([str(source), "--sizes", "10", "--stratify", "source"]) == 0
    assert Counter(row["source"] for row in read(tmp_path / "t_10.jsonl")) == {value: 5, "plain": 5}
    out = capsys.readouterr().out
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 300


def test_a_stratum_for_each_row_takes_no_time_squared():
    values = [str(i) for i in range(200_000)]
    subsets = nested_subsets(len(values), [1000, 100_000], 1, values)
    assert len(set(subsets[100_000].tolist())) == 100_000


def test_a_table_with_values_that_json_does_not_have_is_refused(tmp_path, capsys):
    pyarrow.parquet.write_table(pa.table({"a": [b"x"] * 3}), tmp_path / "t.parquet")
    assert main([str(tmp_path / "t.parquet"), "--sizes", "1"]) == 2
    assert "can't hold the columns a (binary)" in capsys.readouterr().err
