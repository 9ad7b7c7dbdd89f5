"""Files of answers that exist already: their form, what doesn't fit together, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import open_instruct
from open_instruct.adapters.answer_files import read_answers
from open_instruct.errors import InputError
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.generate_peft import main as generate_main
from tests.test_start_up import check_imports, start

ANSWERED = {"id": 1, "answers": "a", "reference": "r"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}]


@pytest.mark.parametrize(
    "row, answers, references",
    [
        ({"question": "q", "answers": {"a": ["x", "y"], "b": "z"}, "reference": "r"}, {"a": "xy", "b": "z"}, "r"),
        ({"prompt": "q", "answers": ["x", "y"], "references": ["r", "s"]}, {"file": "xy"}, "rs"),
        ({"question": "q", "answer": "x", "reference": ["r"]}, {"file": "x"}, "r"),
        ({"instruction": "q", "output": "x", "reference": "r"}, {"file": "x"}, "r"),
        ({"messages": [*question(1), {"role": "assistant", "content": "x"}], "reference": "r"}, {"file": "x"}, "r"),
        ({"messages": [*question(1), {"role": "assistant", "content": "r"}], "answers": "x"}, {"file": "x"}, "r"),
        ({"id": "7", "answers": {"a": [""], "b": ["y"]}, "vote": "y"}, {"a": [""], "b": "y", "vote": "y"}, ""),
        ({"number": 0, "messages": question(1), "answers": {"base": ["x"]}, "reference": "r"}, {"base": "x"}, "r"),
    ],
)
def test_rows_of_every_form(row, answers, references, tmp_path):
    (read,) = read_answers([write(tmp_path / "file.jsonl", row)])
    assert read.answers == {name: tuple(texts) for name, texts in answers.items()}
    assert read.references == tuple(references)


@pytest.mark.parametrize(
    "row, error",
    [
        ({"answers": "a"}, "no question (`messages`, `prompt`, `question` …) and no `id` (columns: answers)"),
        ({"question": "q", "text": "x"}, "no `answers` and no assistant's turn at the end (columns: question, text)"),
        ({"question": "q", "answers": []}, "`answers` is or holds an empty list"),
        ({"question": "q", "answers": [1]}, "`answers` is or holds a number"),
        ({"question": "q", "answers": {"a": None}}, "`answers` of 'a' is or holds null"),
        ({"question": "q", "answers": "a", "answer": "b"}, "`answers` and `answer`: drop one"),
        ({"question": "q", "answers": "a", "reference": " "}, "an empty reference"),
        ({"question": "q", "answers": "a", "references": {}}, "`references` is or holds an object"),
        ({"question": 3, "answers": "a"}, "question (user) has content that is a number"),
        ({"id": True, "answers": "a"}, "`id` is a truth value"),
        ({"question": "q", "answers": {"a\nb": "x"}}, "a name has 1 to 60 characters"),
    ],
)
def test_a_row_that_can_not_be_used_is_named(row, error, tmp_path):
    with pytest.raises(InputError) as caught:
        read_answers([write(tmp_path / "file.jsonl", row)])
    assert error in str(caught.value) and "file.jsonl" in str(caught.value)


def test_bad_rows_are_left_out_where_that_is_allowed(tmp_path, capsys):
    path = write(tmp_path / "file.jsonl", ANSWERED, {"id": 1, "answers": "b"}, {"id": 2, "answers": {"x": "y"}}, 3)
    with pytest.raises(InputError, match=r"file.jsonl:2: id 1 stands at .*file.jsonl:1 already"):
        read_answers([path])
    rows = read_answers([write(tmp_path / "two.jsonl", ANSWERED, {"id": 2, "answers": 5})], bad_rows="skip")
    assert [row.id for row in rows] == ["1"] and "1 of 2 rows can't be used" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no answer of b, which answers other questions"):
        read_answers(
            [write(tmp_path / "b.jsonl", {"id": 1, "answers": {"a": "x", "b": "x"}}, {"id": 2, "answers": {"a": "x"}})]
        )

    without = write(tmp_path / "without.jsonl", {"id": 1, "answers": "a"}, {"id": 2, "answers": "a", "reference": "a"})
    with pytest.raises(InputError, match=r"without.jsonl:1: no `reference` to compare with"):
        open_instruct.evaluate_answers(without)
    assert open_instruct.evaluate_answers(without, names=["exact_match"], bad_rows="skip")["rows"] == 1


def test_references_come_from_a_file_by_question_or_by_id(tmp_path):
    answers = [{"messages": question(number), "answers": f"a{number}"} for number in (3, 1, 1, 2)]
    given = [
        {"messages": [*question(n), {"role": "assistant", "content": f"r{n}{i}"}]} for i, n in enumerate((1, 2, 1, 3))
    ]
    path = write(tmp_path / "answers.jsonl", *answers)
    rows = read_answers([path], write(tmp_path / "file.jsonl", *given))
    assert [row.references[0] for row in rows] == ["r33", "r10", "r12", "r21"]  # of equal questions, in order
    swapped = [{"id": n, "question": "another", "answer": f"r{n}"} for n in (2, 1)]
    rows = read_answers(
        [write(tmp_path / "ids.jsonl", *({"id": n, "answers": "a"} for n in (1, 2)))],
        write(tmp_path / "f.jsonl", *swapped),
    )
    assert [row.references for row in rows] == [("r1",), ("r2",)]
    with pytest.raises(InputError, match="no question in every row, and no `id` in every row"):
        read_answers([path], write(tmp_path / "g.jsonl", {"id": 1, "reference": "x"}))


def test_questions_of_two_files_that_do_not_match_are_named(tmp_path, capsys):
    answers = write(tmp_path / "answers.jsonl", *({"messages": question(n), "answers": "r"} for n in range(6)))
    file = write(tmp_path / "file.jsonl", *({"messages": question(n), "reference": "r"} for n in (0, 9)))
    assert evaluate_main(["--answers", answers, "--file", file, "--metrics", "exact_match"]) == 2
    error = capsys.readouterr().err
    assert (
        len(error.strip().splitlines()) == 1
        and f"5 of 6 only in {answers}" in error
        and f"1 of 2 only in {file}" in error
    )
    assert (
        all(f"answers.jsonl:{line} 'question {line - 1}'" in error for line in (2, 3, 4)) and "question 4" not in error
    )
    assert evaluate_main(["--answers", answers, "--file", file, "--metrics", "exact_match", "--bad_rows", "skip"]) == 0
    output = capsys.readouterr()
    assert "1 questions" in output.out and "left out, as --bad_rows skip says" in output.err
    nothing = write(tmp_path / "nothing.jsonl", {"messages": question(7), "reference": "r"})
    assert evaluate_main(["--answers", answers, "--file", nothing, "--bad_rows", "skip"]) == 2


def test_answers_of_several_files_are_compared_on_the_same_questions(tmp_path):
    """Paired: the interval of a constant difference has no width, whatever the questions' own spread."""
    rows = [{"id": n, "answers": ["x", "y"], "reference": "x" if n % 2 else "z"} for n in range(40)]
    one = write(tmp_path / "one.jsonl", *rows)
    two = write(
        tmp_path / "two.jsonl", *({"id": n, "answers": {"a": ["x", "x"], "b": "y"}} for n in reversed(range(40)))
    )
    result = open_instruct.evaluate_answers([one, f"second={two}"], names=["exact_match"], several=["mean"])
    assert list(result["figures"]) == ["one", "second/a", "second/b"]
    values = [figures["exact_match"]["value"] for figures in result["figures"].values()]
    assert values == [0.25, 0.5, 0]
    pairs = {(pair["model"], pair["baseline"]): pair["figures"]["exact_match"] for pair in result["differences"]}
    assert pairs["second/a", "one"]["value"] == 0.25 and len(pairs) == 3
    same = open_instruct.evaluate_answers([f"a={one}", f"b={one}"], names=["bleu", "exact_match"])
    (pair,) = same["differences"]
    assert pair["figures"]["exact_match"] == {"value": 0, "interval": [0, 0]}
    low, high = same["figures"]["a"]["exact_match"]["interval"]
    assert low < 0.25 < high
    with pytest.raises(InputError, match="two files have answers of 'one'"):
        read_answers([one, one])
    assert next(iter(open_instruct.evaluate_answers([f"a={one}", f"base={one}"], names=["bleu"])["figures"])) == "base"


METRICS = """
from helper import SCALE
def length(answer, references):
    return SCALE * len(answer)
def holds(answer, references):
    return any(reference in answer for reference in references)
def fails(answer, references):
    return 1 / len(answer)
def words(answer, references):
    return answer
def alone(answer):
    return 1
"""


def test_a_metric_of_ones_own(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(METRICS)
    (tmp_path / "helper.py").write_text("SCALE = 2\n")
    answers = write(
        tmp_path / "a.jsonl", {"id": 1, "answers": {"m": ["abc", ""]}}, {"id": 2, "answers": {"m": ["a", "b"]}}
    )
    result = open_instruct.evaluate_answers(answers, names=[], metric=f"{path}:length")
    assert result["figures"]["m"]["length"]["value"] == 2.5 and result["figures"]["m"]["length best"]["value"] == 4
    file = write(tmp_path / "f.jsonl", {"id": 1, "references": ["c", "x"]}, {"id": 2, "reference": "b"})
    words = ["--answers", answers, "--file", file, "--metrics", "none", "--metric"]
    assert evaluate_main([*words, f"{path}:holds", "--pass_at", "1", "2"]) == 0
    output = capsys.readouterr().out
    assert "| pass@1 holds | 0.5 [" in output and "| pass@2 holds | 1 [" in output and "exact_match" not in output
    for function, error in (
        ("fails", f"{path}:fails failed at {answers}:1, model m: ZeroDivisionError: division by zero ({path}:8)"),
        ("words", f"{path}:words returned 'abc' at {answers}:1, model m"),
        ("alone", "does not take an answer and its references"),
        ("missing", "has no function missing"),
    ):
        assert evaluate_main([*words, f"{path}:{function}"]) == 2
        printed = capsys.readouterr().err
        assert error in printed and len(printed.strip().splitlines()) == 1
    path.write_text("def broken(:\n")
    assert evaluate_main([*words, f"{path}:broken"]) == 2
    assert f"can't be imported: SyntaxError: invalid syntax (mine.py, line 1) ({path}:1)" in capsys.readouterr().err
    path.write_text("def bleu(answer, references): return 1\n")
    assert evaluate_main([*words, f"{path}:bleu"]) == 2 and "a figure has that name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, error",
    [
        ("--adapter x --batch_size 3", "--adapter, --batch_size: no effect with --answers"),
        ("--metrics loss bleu", "--metrics loss needs a model"),
        ("--metrics none", "--metrics none leaves only the figures of --metric"),
        ("--metrics bleu --stemmer", "--stemmer has no effect without ROUGE"),
        ("--metrics bleu --pass_at 1", "--pass_at needs to know which answers are right"),
        ("--pass_at 2", "--pass_at 2 needs as many answers to a question: the largest number here is 1"),
        ("--several best", "--several has no effect: every question has one answer"),
        ("--file FILE", "has no effect: every row of --answers has a reference"),
        ("--metric x", "--metric x is no FILE.py:FUNCTION"),
    ],
)
def test_flags_without_effect_are_refused(words, error, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", ANSWERED)
    try:
        code = evaluate_main(["--answers", path, *words.replace("FILE", path).split()])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and error in capsys.readouterr().err


def test_flags_of_answers_belong_to_answers(capsys):
    with pytest.raises(SystemExit):
        evaluate_main(["--file", "x.jsonl", "--stemmer", "--pass_at", "1"])
    assert "--pass_at, --stemmer belong to --answers" in capsys.readouterr().err


def test_what_generation_writes_is_measured_without_a_model(trained, questions_file, tmp_path):
    """The figures are those of the evaluation that generates the answers itself; and no torch is imported."""
    adapter, output = str(trained / "lora"), tmp_path / "answers.jsonl"
    base = ["--adapter", adapter, "--max_new_tokens", "16"]
    assert generate_main([*base, "--input_file", str(questions_file), "--output_file", str(output)]) == 0
    own = open_instruct.evaluate(
        str(questions_file), adapter, names=["exact_match", "rouge", "bleu", "chrf"], max_new_tokens=16
    )
    result, modules = start(
        "open_instruct/evaluate_peft.py", "--answers", str(output), "--output_dir", str(tmp_path / "out"), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "torch" not in modules and "transformers" not in modules
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())["figures"]["lora"]
    for name in ("exact_match", "rouge1", "rouge2", "rougeL", "bleu", "chrf"):
        assert figures[name] == own["figures"]["lora"][name]
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 5000
    assert "| rouge1_precision |" in (tmp_path / "out" / "evaluation.md").read_text()
    missing, modules = start("open_instruct/evaluate_peft.py", "--answers", "missing.jsonl", cwd=tmp_path)
    assert missing.returncode == 2 and "no such file: missing.jsonl" in missing.stderr
    check_imports("open_instruct/evaluate_peft.py", modules)
