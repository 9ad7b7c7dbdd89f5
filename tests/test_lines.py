"""Members of a JSON array, one at a time: what `json.loads` gives, or one error that names the row."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from open_instruct.data import lines
from open_instruct.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(VALUES, max_size=5), size=st.sampled_from([1, 7, 12, 13, 64, 1 << 20]), ascii_only=st.booleans())
def test_rows_are_those_of_json_at_every_chunk_size(rows, size, ascii_only, tmp_path, monkeypatch):
    rows = json.loads(json.dumps(rows, ensure_ascii=True).encode().replace(b"\\ud", b"\\ue"))  # no half pairs
    monkeypatch.setattr(lines, "ARRAY_CHUNK_BYTES", size)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=ascii_only), encoding="utf-8")
    assert repr(list(lines.array_rows(path))) == repr(rows)


def test_pairs_and_escaped_backslashes_are_text(tmp_path, monkeypatch):
    text = r'["\ud83d\ude00", "\\ud83d", "\\\\ud83d", "\\\ud83d\ude00", "漢\ud83D\uDE00"]'
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    for size in range(1, 40):
        monkeypatch.setattr(lines, "ARRAY_CHUNK_BYTES", size)
        assert list(lines.array_rows(tmp_path / "rows.json")) == json.loads(text)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"[1]garbage", "malformed JSON in row 2 .text follows after the end"),
        (b"[1] [2]", "malformed JSON in row 2 .text follows after the end"),
        (b"[{} {} {}]", "malformed JSON in row 2 .a comma is missing"),
        (b"[{},]", "malformed JSON in row 2"),
        (b"[{},,{}]", "malformed JSON in row 2"),
        (b"[,{}]", "malformed JSON in row 1"),
        (b"[{}, {", "malformed JSON in row 2 .Expecting property name"),
        (b"[{}, 01]", "malformed JSON in row 3"),
        (b"[NaN]", "malformed JSON in row 1"),
        (b'[1, "\xff"]', "not UTF-8 in row 2: convert"),
        (b'["\xed\xa0\x80"]', "not UTF-8 in row 1"),
        (b'["ok", "\\ud800"]', "half of a surrogate pair in row 2"),
        (b'["ok", "\\\\\\ud800x"]', "half of a surrogate pair in row 2"),
        (b'["\\ud800\\u0041"]', "half of a surrogate pair"),
        (b'["\\udc00"]', "half of a surrogate pair"),
        (b'{"item": [1]}', "holds no JSON array"),
        (b"[1e]", "malformed JSON in row 2"),
        (b'[{"a": 1', "malformed JSON in row 1"),
        (b'[{"a": 1, "a": 1}]', "row 1 .*the key 'a' stands there twice"),
        (b"[1" + b"0" * 5000 + b"]", "row 1 .*4300 digits"),
        (b"[" * 100_000, "row 1 .*nested too deeply"),
    ],
)
@pytest.mark.parametrize("size", [1, 12, 1 << 20])
def test_what_is_no_array_is_named(content, says, size, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "ARRAY_CHUNK_BYTES", size)
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(InputError, match=says):
        list(lines.array_rows(tmp_path / "rows.json"))


def test_a_mistake_in_an_array_is_found_without_reading_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "ARRAY_CHUNK_BYTES", 256)
    text = json.dumps([{"id": f"r{i}", "text": "x" * 200} for i in range(1000)])
    path = tmp_path / "t.json"
    path.write_text(text.replace(', "text"', ' "text"', 1))
    sizes = []

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, size):
            sizes.append(size)
            return self.file.read(size)

    monkeypatch.setattr(lines, "open_bytes", lambda path: Counted(path.open("rb")))
    with pytest.raises(InputError, match="malformed JSON in row 1 "):
        list(lines.array_rows(path))
    assert len(sizes) < 5 and set(sizes) == {256}


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(num_rows):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([{"id": i, "text": "word " * 200} for i in range(num_rows)]))
        tracemalloc.start()
        assert sum(1 for _ in lines.array_rows(path)) == num_rows
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak_bytes

    assert peak(20_000) < 1.5 * peak(2_000)
