"""Every kind of bad file gives one error that names the place, the value and the remedy."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from open_instruct.data import reading
from open_instruct.errors import InputError

GOOD = {"id": "1", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "source": "s"}


def read(path: Path):
    return list(reading.conversations(reading.read_rows(path)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "array.json", "rows.parquet"])
def test_every_format_gives_the_same_conversations(tmp_path, name):
    path = tmp_path / name
    if name == "rows.parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([GOOD, GOOD]), path)
    elif name == "array.json":
        path.write_text(json.dumps([GOOD, GOOD], indent=1))
    else:
        path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD) + "\n")
    assert [messages for _, messages in read(path)] == [GOOD["messages"]] * 2


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b'{"messages": [}\n', r"f\.jsonl:1: malformed JSON"),
        (json.dumps(GOOD).encode() + b"\n{oops\n", r"f\.jsonl:2: malformed JSON"),
        (b'{"messages": "\xff"}\n', r"f\.jsonl:1: not UTF-8"),
        (b"[1, 2]", "is a number: a row must be a JSON object"),
        (b'{"text": "x"}\n', r"no `messages` \(columns: text\): known forms are"),
        (b'{"messages": []}\n', "not empty"),
        (b'{"messages": "hello"}\n', "must be a list"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}\n', "message 1 has role 'robot': known roles"),
        (b'{"messages": [{"role": "user", "content": null}]}\n', "content that is null"),
        (b'{"messages": [{"role": "user", "content": "  "}]}\n', "content that is empty"),
        (b'{"messages": [{"role": "user", "content": ["x"]}]}\n', "content that is a list"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "no assistant message"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}\n', "the assistant speaks first"),
    ],
)
def test_bad_content_is_named(tmp_path, content, says):
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(tmp_path / "f.jsonl")


def test_bad_paths_are_named(tmp_path):
    (tmp_path / "there.jsonl").write_text("{}")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(InputError, match=r"no such file.*its folder has there\.jsonl"):
        read(tmp_path / "three.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"ends in \.csv"):
        read(tmp_path / "rows.csv")
    with pytest.raises(InputError, match="truncated or damaged"):
        read(tmp_path / "torn.parquet")


@pytest.mark.parametrize("amount, count", [("1.0", 10), ("0.5", 5), ("3", 3)])
def test_mixture_amounts_are_shares_with_a_point_and_rows_without(tmp_path, amount, count):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({**GOOD, "id": i}) + "\n" for i in range(10)))
    rows = [row["id"] for _, row in reading.read_mixture([(str(path), amount)], ["train"], seed=0)]
    assert len(set(rows)) == count and rows == sorted(rows)


@pytest.mark.parametrize(
    "amount, says", [("many", "not a number"), ("11", "asks for 11 rows: it has 10"), ("1.5", "asks for 15")]
)
def test_bad_mixture_amounts_are_named(amount, says):
    with pytest.raises(InputError, match=says):
        reading.mixture_count("a.jsonl", amount, 10)
