"""Rows that stand in both sets, against a slow and plain comparison of their texts."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_instruct.data.duplicates import conversation_text, hashes_of, normalised, overlap_of
from open_instruct.errors import InputError

PIECES = st.lists(
    st.sampled_from(["Été", "été", "a b", "A  B!", "ab", "2+2", "2-2", "。漢字", "漢 字", "x\n"]), max_size=3
)
ROWS = st.lists(st.tuples(PIECES.map("".join), PIECES.map("".join)), max_size=8)


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def plain(text: str) -> str:
    """Without case, white space and punctuation, one character after the other."""
    return "".join(c for c in text.lower() if not c.isspace() and unicodedata.category(c)[0] not in "PZ")


@given(text=st.text())
def test_normalised_texts_are_those_of_the_plain_way(text):
    assert normalised(text).decode(errors="surrogatepass") == plain(text) or any(ord(c) > 0xFFFF for c in text)


@given(train=ROWS, held_out=ROWS)
def test_overlaps_are_those_of_comparing_all_pairs(train, held_out):
    hashes = [
        [np.array([hashes_of(conversation(*row))[which] for row in rows], np.int64) for which in (0, 1)]
        for rows in (train, held_out)
    ]
    overlap = overlap_of(*hashes, are_dropped=False)
    exact = [row in train for row in held_out]
    similar = [
        any([plain(part) for part in row] == [plain(part) for part in other] for other in train) for row in held_out
    ]
    assert overlap.exact.tolist() == exact
    assert (overlap.exact | overlap.nearly).tolist() == similar


def test_a_character_more_is_another_row():
    """Negative control, and borders between turns count."""
    one = conversation("2+2", "4")
    assert hashes_of(one) == hashes_of([{"content": "2+2", "role": "user", "name": None}, one[1]])
    for other in (conversation("2+3", "4"), conversation("2+", "24"), [{**one[0], "name": "x"}, one[1]], one[:1]):
        assert all(ours != theirs for ours, theirs in zip(hashes_of(one), hashes_of(other), strict=True)), other
    assert hashes_of(one)[0] != hashes_of(conversation("2 + 2", "4."))[0]
    assert hashes_of(one)[1] == hashes_of(conversation("2 + 2", "4."))[1]
    assert "\0" in conversation_text(one)


@pytest.fixture
def files(tmp_path, data_file):
    """60 rows to train on, and 12 others of which 3 stand there too, and 2 but for case and punctuation."""
    rows = [json.loads(line)["messages"] for line in data_file.read_text().splitlines()]
    train, held_out = rows[:60], rows[60:67] + rows[:3]
    held_out += [[{**m, "content": f"{m['content'].upper()} !"} for m in row] for row in rows[3:5]]
    for name, part in (("train", train), ("held_out", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in part))
    return tmp_path


def test_a_run_counts_them_and_leaves_them_out(files, train):
    words = ["--use_lora", "--max_train_steps", "1", "--validation_file", str(files / "held_out.jsonl")]
    words += ["--validation_fraction", "0"]
    first = train("first", *words, data=files / "train.jsonl")
    assert first.code == 0, first.err
    how = "(3 exactly, 2 but for case, white space and punctuation)"
    assert first.out.count(f"held out: 5 of 12 rows stand in the training data, too {how}; --drop_held") == 1
    again = train("again", *words, "--drop_held_out_duplicates", data=files / "train.jsonl")
    assert f"held out: 5 of 12 rows left out, as they stand in the training data {how}\n" in again.out
    assert "held out: 7 conversations" in again.out and "held out: 12 conversations" in first.out
    record = json.loads((again.folder / "run.json").read_text())
    assert record["held_out_duplicates"] == {"exact": 3, "normalised": 2, "left_out": True}
    rest = (files / "held_out.jsonl").read_text().splitlines(keepends=True)[:7]
    (files / "held_out.jsonl").write_text("".join(rest))
    control = train("control", *words, data=files / "train.jsonl")
    assert control.summary["final_eval_loss"] == again.summary["final_eval_loss"]
    assert "held out: none of the 7 rows stands in the training data\n" in control.out


def test_nothing_left_and_nothing_held_out_are_refused(files, train):
    lines = (files / "train.jsonl").read_text().splitlines(keepends=True)
    (files / "held_out.jsonl").write_text("".join(lines[:9]))
    words = ["--use_lora", "--drop_held_out_duplicates", "--validation_fraction", "0"]
    run = train("none", *words, "--validation_file", str(files / "held_out.jsonl"), data=files / "train.jsonl")
    assert run.code == 2 and "leaves none of the 9 held-out rows" in run.err and run.err.count("\n") == 1
    run = train("without", *words, "--validation_fraction", "0", data=files / "train.jsonl")
    assert run.code == 2 and "no rows are held out" in run.err and run.err.count("\n") == 1


def test_all_held_out_rows_left_out_is_an_error_of_the_input():
    ours = [np.array([1, 2]), np.array([1, 2])]
    with pytest.raises(InputError, match="hold out others"):
        _ = overlap_of(ours, ours, are_dropped=True).kept
    assert overlap_of(ours, ours, are_dropped=False).kept.tolist() == [0, 1]
    assert overlap_of(ours, [np.zeros(0, int)] * 2, are_dropped=True).exact.tolist() == []
