"""Splits of a file: disjoint, stable, with equal conversations on one side."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from fractions import Fraction

import pyarrow as pa
import pyarrow.parquet
import pytest

from open_instruct.data import reading
from open_instruct.data.splits import draw_splits, parse_shares
from open_instruct.errors import InputError
from sample_subsets import main
from tests.conftest import write_conversations

SHARES = ["train=0.8", "validation=.1", "test=0.1"]


def row(question: str, source: str = "s") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    return {"messages": messages, "source": source}


ROWS = [row(f"question {number}", f"source {number % 3}") for number in range(3000)]


def sides(rows: list[dict], seed: int = 1, words: list[str] = SHARES) -> dict[str, str]:
    """The split of each row, by its question."""
    splits = draw_splits((("row", each) for each in rows), parse_shares(words), seed)
    assert sorted(int(index) for chosen in splits.values() for index in chosen) == list(range(len(rows)))
    names = {int(index): name for name, chosen in splits.items() for index in chosen}
    return {rows[index]["messages"][0]["content"]: names[index] for index in range(len(rows))}


def test_a_row_stays_on_its_side_when_others_come_and_go():
    first, more = sides(ROWS), [row(f"new {number}") for number in range(500)]
    mixed = [*more, *ROWS[::-1]]
    random.Random(0).shuffle(mixed)
    assert first.items() <= sides(mixed).items()
    assert sides(ROWS[:700]).items() <= first.items()
    assert sides(ROWS, seed=2) != first  # control


def test_equal_conversations_are_on_one_side_whatever_their_source():
    doubled = [*ROWS[:200], *(row(f" QUESTION {n}!", "other") for n in range(200))]
    found = sides(doubled)
    assert all(found[f"question {n}"] == found[f" QUESTION {n}!"] for n in range(200))
    other = sides([*ROWS[:200], *(row(f"query {n}") for n in range(200))])
    assert any(other[f"question {n}"] != other[f"query {n}"] for n in range(200))  # control


def test_shares_are_kept_in_each_source_as_chance_does():
    found = Counter((each["source"], name) for each, name in zip(ROWS, sides(ROWS).values(), strict=True))
    assert len(found) == 9
    for (_, name), count in found.items():
        share = {"train": 0.8}.get(name, 0.1)
        assert abs(count - 1000 * share) < 4 * math.sqrt(1000 * share * (1 - share)), (name, count)


def test_the_sides_are_the_same_on_every_machine():
    """Recorded once: another split of data that someone has trained on must be noticed."""
    assert "".join(sides(ROWS[:12], words=["a=0.5", "b=0.5"]).values()) == "bbbbaabbabbb"


@pytest.mark.parametrize("kind", ["lines", "array", "parquet"])
def test_files_manifest_and_reading(kind, tmp_path, capsys):
    path = tmp_path / {"lines": "t.jsonl", "array": "t.json", "parquet": "t.parquet"}[kind]
    if kind == "lines":
        path.write_text("".join(json.dumps(each) + "\n" for each in ROWS[:300]))
    elif kind == "array":
        path.write_text(json.dumps(ROWS[:300]))
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS[:300]), path)
    assert main([str(path), "--splits", *SHARES, "--seed", "1"]) == 0
    expected = sides(ROWS[:300])
    manifest = json.loads((tmp_path / "t_splits.manifest.json").read_text())
    assert [record["name"] for record in manifest["splits"]] == ["train", "validation", "test"]
    for record in manifest["splits"]:
        content = (tmp_path / f"t_{record['name']}.jsonl").read_bytes()
        rows = [json.loads(line) for line in content.splitlines()]
        questions = [each["messages"][0]["content"] for each in rows]
        assert questions == [question for question, name in expected.items() if name == record["name"]]
        assert record["rows"] == len(rows) and record["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["counts"] == dict(Counter(each["source"] for each in rows).most_common())
    assert manifest["seed"] == 1 and (tmp_path / "t_splits.png").exists()
    assert "source 0" in capsys.readouterr().out
    names = [tmp_path / f"t_{name}.jsonl" for name in ("train", "test")]
    assert len(list(reading.files_of(str(names[0])))) == 1
    with pytest.raises(InputError, match="a part of the other"):
        reading.files_of(str(tmp_path / "t*"))


@pytest.mark.parametrize(
    "words, says",
    [
        (["--splits", "train=0.8", "test=0.1"], "the shares sum to 0.9, not 1"),
        (["--splits", "train=0.8", "test"], "give names with shares between 0 and 1"),
        (["--splits", "train=1", "test=0"], "give names with shares between 0 and 1"),
        (["--splits", "train=0.5", "Train=0.5"], "names Train twice"),
        (["--splits", "../x=0.5", "b=0.5"], "give names with shares"),
        (["--splits", "a=0.5", "b=0.5", "--sizes", "3"], "--sizes: splits take all rows"),
        (["--splits", "a=0.5", "b=0.5", "--stratify", "source"], "--stratify: splits take all rows"),
        (["--splits", "a=0.5", "b=0.5", "--order", "shuffled"], "--order shuffled: splits take"),
        (["--splits", "a=0.999999999", "b=0.000000001"], "b=1e-09 gets none of the 40 rows"),
        (["--splits", "a=0.5", "b=0.5", "--unknown_form"], "known forms are"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(words, says, tmp_path, capsys):
    path = write_conversations(tmp_path / "t.jsonl", "reverse", 40)
    if words[-1] == "--unknown_form":
        words = words[:-1]
        path.write_text(path.read_text() + '{"text": "x", "source": "y"}\n')
    try:
        code = main([str(path), *words])
    except SystemExit as end:  # of the argument parser
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and error.count("\n") == 1, error
    assert [found.name for found in tmp_path.iterdir()] == ["t.jsonl"]


def test_shares_are_exact():
    assert parse_shares(["a=.3", "b=0.7"]) == {"a": Fraction(3, 10), "b": Fraction(7, 10)}
    assert sum(parse_shares([f"s{n}=0.1" for n in range(10)]).values()) == 1
