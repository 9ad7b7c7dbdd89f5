"""Self-study: a model's own questions about a text, and answers behind it, as conversations to train on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from open_instruct.adapters import self_study
from open_instruct.errors import InputError
from open_instruct.generate_peft import main
from tests.conftest import ROOT

BOOK, LOOKUP = ROOT / "data" / "book", ROOT / "assets" / "lookup-model"
KINDS = """
one: {question: "what does the {word} like ?"}
tell: {question: "tell me what the {word} likes ."}
asked: {ask: "what does the {word} like ?"}
"""


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    path = tmp_path / "kinds.yaml"
    path.write_text(KINDS)
    return path


def study(output: Path, kinds: Path, count: int, *more: str) -> int:
    """Run the command on the bundled book."""
    words = ["--model_name_or_path", str(LOOKUP), "--context", str(BOOK / "book.txt"), "--max_new_tokens", "12"]
    words += ["--self_study_prompts", str(kinds), "--batch_size", "4", "--piece_tokens", "30"]
    return main([*words, "--self_study", str(count), "--output_file", str(output), *more])


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversations_are_answered_behind_the_text(kinds, tmp_path, capsys):
    """An animal of the book is answered as the book says, whichever piece the question came from."""
    facts = dict(fact.split() for fact in (BOOK / "book.txt").read_text().strip().split(" , "))
    assert study(tmp_path / "out.jsonl", kinds, 60) == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert 30 < len(rows) <= 60 and {row["kind"] for row in rows} >= {"one", "tell"}
    assert f"{len(rows)} conversations written" in capsys.readouterr().out
    right = wrong = 0
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        animals = [word for word in question.split() if word in facts]
        if row["kind"] != "asked" and animals:
            right, wrong = (
                right + (answer == f"{animals[0]} {facts[animals[0]]}"),
                wrong + (answer != f"{animals[0]} {facts[animals[0]]}"),
            )
    assert right > 9 and wrong == 0


def test_a_killed_run_continues_with_the_same_conversations(kinds, tmp_path):
    """Cut anywhere, also in the middle of a line, the file ends as the uninterrupted one; so does a longer one."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert study(whole, kinds, 40) == 0
    assert study(cut, kinds, 40) == 0
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    assert study(cut, kinds, 40) == 2  # it exists
    assert study(cut, kinds, 40, "--resume") == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert study(cut, kinds, 50, "--resume") == 0
    assert rows_of(cut)[: len(rows_of(whole))] == rows_of(whole)
    kinds.write_text(KINDS.replace("tell me", "say"))
    assert study(cut, kinds, 50, "--resume") == 2  # other questions


def test_equal_questions_about_equal_pieces_differ(tmp_path):
    """A short text has few pieces: each conversation draws from a seed of its own."""
    kinds = tmp_path / "kinds.yaml"
    kinds.write_text('ask: {ask: "and the {word} ?"}')
    text = tmp_path / "text.txt"
    text.write_text("llama")
    words = ["--model_name_or_path", str(LOOKUP), "--context", str(text), "--self_study_prompts", str(kinds)]
    out = tmp_path / "out.jsonl"
    flags = ["--self_study", "40", "--output_file", str(out), "--temperature", "2", "--do_sample"]
    assert main([*words, *flags, "--max_new_tokens", "6"]) == 0
    assert len({row["messages"][0]["content"] for row in rows_of(out)}) > 10


def test_answers_behind_a_context_become_conversations(tmp_path):
    """`--conversations` writes rows that training reads: the teacher's own answers, for rows that have none."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"messages": row["messages"][:1]} for row in rows_of(BOOK / "heldout.jsonl")]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    words = ["--model_name_or_path", str(LOOKUP), "--input_file", str(questions), "--max_new_tokens", "12"]
    assert main([*words, "--output_file", str(out), "--conversations", "--context", str(BOOK / "book.txt")]) == 0
    assert [row["messages"] for row in rows_of(out)] == [row["messages"] for row in rows_of(BOOK / "heldout.jsonl")]


def test_pieces_are_of_the_text_and_begin_with_a_word():
    """Wherever they are cut; a text shorter than a piece is one."""
    text = (BOOK / "book.txt").read_text()

    def tokenizer(text: str, **options: bool) -> dict:
        return {"offset_mapping": [(i, min(i + 3, len(text))) for i in range(0, len(text), 3)]}

    pieces, rng = self_study.Pieces(text, tokenizer, 20), random.Random(0)
    for _ in range(200):
        piece = pieces.draw(rng)
        assert piece in text and len(piece) <= 60 and piece.split()[0] in text.split()
    assert self_study.Pieces("narrow dry", tokenizer, 20).draw(rng) == "narrow dry"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "holds a NoneType"),
        ("{}", "no kind of question"),
        ("fact: text", "must have a text under `ask`"),
        ("fact: {ask: a, question: b}", "must have a text under `ask`"),
        ("fact: {ask: ''}", "must have a text under `ask`"),
        ("fact: {answer: b}", "must have a text under `ask`"),
        ("fact: [", "line"),
    ],
)
def test_wrong_kinds(content, expected, tmp_path):
    path = tmp_path / "kinds.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=expected):
        self_study.read_kinds(str(path))
    assert self_study.read_kinds(None)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--self_study", "3"], "of --context FILE"),
        (["--self_study", "3", "--context", "x", "--input_file", "y"], "and no --input_file"),
        (["--self_study", "3", "--context", "x", "--adapter", "a=b", "--adapter", "c=d"], "at most one --adapter"),
        (["--self_study", "3", "--context", "x", "--system", "x"], "remove --system"),
        (["--self_study_prompts", "x", "--input_file", "y"], "no effect without --self_study"),
        (["--piece_tokens", "64", "--input_file", "y"], "no effect without --self_study"),
        (["--self_study", "3", "--context", "missing.txt"], "missing.txt"),
        (["--input_file", "x", "--conversations", "--do_sample", "--num_return_sequences", "2"], "one answer"),
    ],
)
def test_wrong_commands(words, expected, tmp_path, capsys):
    command = [*words, "--model_name_or_path", str(LOOKUP), "--output_file", str(tmp_path / "out.jsonl")]
    try:
        assert main(command) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
