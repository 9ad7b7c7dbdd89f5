"""Every kind of bad file gives one error that names the place, the value and the remedy."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from open_instruct.data import lines, reading
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


ROW = json.dumps(GOOD).encode()


@pytest.mark.parametrize(
    "name, content",
    [
        ("f.jsonl", b"\xef\xbb\xbf" + ROW),
        ("f.json", b"\xef\xbb\xbf[" + ROW + b"]"),
        ("f.jsonl", ROW + b"\r\n\r\n"),
        ("f.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + ROW, mtime=0)),
        ("f.json.gz", gzip.compress(b"[" + ROW + b"]", mtime=0)),
        ("f.jsonl.zst", pa.compress(ROW, "zstd", asbytes=True)),
    ],
    ids=range(6),
)
def test_what_means_nothing_is_accepted(name, content, tmp_path):
    """A byte order mark of UTF-8, line ends of Windows, white space, compression."""
    (tmp_path / name).write_bytes(content)
    assert [messages for _, messages in read(tmp_path / name)] == [GOOD["messages"]]


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("f.jsonl", ROW.decode().encode("utf-16"), "is no UTF-8 text"),
        ("f.jsonl", ROW.decode().encode("utf-16-le"), "is no UTF-8 text"),
        ("f.jsonl", ROW.decode().encode("utf-32"), "is no UTF-8 text"),
        ("f.jsonl", gzip.compress(ROW, mtime=0), r"is compressed: give it a name that ends in \.gz"),
        ("f.jsonl.gz", ROW, "is not compressed as its name says"),
        ("f.jsonl.gz", gzip.compress(ROW, mtime=0)[:-4], "Truncated compressed stream"),
        ("f.jsonl.zst", pa.compress(ROW, "zstd", asbytes=True)[:-4], "Truncated compressed stream"),
        ("f.jsonl.gz", gzip.compress(ROW, mtime=0) + b"garbage", "zlib inflate failed"),
        ("f.parquet", ROW, "neither Arrow nor Parquet"),
        ("f.jsonl", b"a,b\n1,2\n", r"f\.jsonl:1: malformed JSON"),
    ],
    ids=range(10),
)
def test_files_that_are_not_what_their_names_say_are_named(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(tmp_path / name)


@pytest.mark.parametrize("name, content", [("f.jsonl.gz", b'{"a": "'), ("f.json.gz", b'[{"a": "')], ids=range(2))
def test_a_small_file_can_not_fill_the_memory(name, content, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_ROW_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content + b"x" * (4 << 20), mtime=0))
    assert (tmp_path / name).stat().st_size < 10_000
    with pytest.raises(InputError, match="is longer than 1 MB"):
        read(tmp_path / name)


def test_a_file_that_grows_is_read_to_where_it_ended(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(ROW + b"\n")
    rows = reading.read_rows(path)
    count = 0
    for _ in rows:
        count += 1
        with path.open("ab") as file:
            file.write(ROW + b"\n")
    assert count == 1
