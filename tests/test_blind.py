"""Blind comparisons: the page names no model, and what it lets one download is counted."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess

import pytest

from open_instruct.adapters.blind_results import count_results
from open_instruct.errors import InputError
from open_instruct.evaluate_peft import main as evaluate_main

MODELS = ["lora", "prefix-tuning", "base"]
HOSTILE = "</script><script>alert('x')</script> & SHEET 猫"


def write_answers(path, count=30):
    rows = [
        {"question": f"question {n}", "answers": {name: [f"{n} {name[::-1]}", "second"] for name in MODELS}}
        for n in range(count)
    ]
    rows[0]["answers"]["lora"] = [HOSTILE]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sheet_of(page):
    return json.loads(re.search(r'<script type="application/json" id="sheet">(.*?)</script>', page, re.DOTALL).group(1))


def results_of(sheet, choices, judge):
    """What the page's own function `results` returns, in Python."""
    key = json.loads(base64.b64decode(sheet["key"]))
    orders = [[key["models"][model] for model in order] for order in key["orders"]]
    judgements = [
        {"question": n, "order": orders[n], "chosen": None if place < 0 else orders[n][place]}
        for n, place in choices.items()
    ]
    counts = {"questions": len(orders), "judgements": judgements}
    return {"sheet": sheet["digest"], "judge": judge, "models": key["models"], **counts}


@pytest.fixture
def page(tmp_path):
    words = ["--answers", write_answers(tmp_path / "answers.jsonl"), "--blind_sheet", str(tmp_path / "sheet.html")]
    assert evaluate_main(words) == 0
    return (tmp_path / "sheet.html").read_text()


def test_the_page_shows_every_first_answer_in_shuffled_order_and_names_nobody(page, tmp_path):
    sheet = sheet_of(page)
    key = json.loads(base64.b64decode(sheet["key"]))
    assert not any(name in page for name in ("lora", "prefix-tuning", "answers.jsonl"))
    assert not re.search(r"(src|href)=|https?:", page) and "alert('x')</script>" not in page
    for n, (question, order) in enumerate(zip(sheet["questions"], key["orders"], strict=True)):
        expected = [f"{n} {name[::-1]}" for name in MODELS]
        expected[0] = expected[0] if n else HOSTILE
        assert question["answers"] == [expected[MODELS.index(key["models"][model])] for model in order]
        assert question["messages"] == [{"role": "user", "content": f"question {n}"}]
    assert {tuple(order) for order in key["orders"]} == {
        (0, 1, 2),
        (0, 2, 1),
        (1, 0, 2),
        (1, 2, 0),
        (2, 0, 1),
        (2, 1, 0),
    }
    again, other = tmp_path / "again.html", tmp_path / "other.html"
    for path, words in ((again, []), (other, ["--seed", "7"])):
        answers = ["--answers", str(tmp_path / "answers.jsonl")]
        assert evaluate_main([*answers, "--blind_sheet", str(path), *words]) == 0
    assert again.read_text() == page != other.read_text()


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's program needs node")
def test_the_page_lets_one_download_what_is_counted(page, tmp_path):
    choices = {0: 2, 3: -1, 29: 0}
    program = re.search(r"<script>\n(.*?)</script>", page, re.DOTALL).group(1)
    sheet = sheet_of(page)
    call = f"console.log(JSON.stringify(results({json.dumps(sheet)}, {json.dumps(choices)}, 'me')))"
    printed = subprocess.run(["node", "-e", f"{program}\n{call}"], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == results_of(sheet, choices, "me")


def test_results_of_judges_are_counted_by_hand(page, tmp_path, capsys):
    sheet = sheet_of(page)
    orders = [row["order"] for row in results_of(sheet, dict.fromkeys(range(30), 0), "")["judgements"]]
    one = {n: orders[n].index("lora") for n in range(20)} | {n: -1 for n in range(20, 24)}
    two = {n: orders[n].index("base") for n in range(10)} | {n: orders[n].index("lora") for n in range(10, 15)}
    paths = []
    for judge, choices in (("Ann", one), ("", two)):
        path = tmp_path / f"results{judge}.json"
        path.write_text(json.dumps(results_of(sheet, choices, judge)))
        paths.append(str(path))
    result = count_results(paths)
    values = {name: figures["preferred"]["value"] for name, figures in result["figures"].items()}
    assert list(values) == ["base", "lora", "prefix-tuning"]
    assert values["lora"] == pytest.approx((10 * 0.5 + 10 * 1 + 4 / 3) / 24)
    assert values["base"] == pytest.approx((10 * 0.5 + 4 / 3) / 24) and sum(values.values()) == pytest.approx(1)
    assert (result["rows"], result["unjudged"], result["judgements"], result["equal"]) == (24, 6, 39, 4)
    assert result["agreement"] == pytest.approx(5 / 15) and result["judges"] == ["Ann", "results"]
    first = sum(orders[n][0] == "lora" for n in [*range(20), *range(10, 15)])
    assert result["first"] == first + sum(orders[n][0] == "base" for n in range(10))
    low, high = result["figures"]["lora"]["preferred"]["interval"]
    assert low < values["lora"] < high
    (pair,) = [
        p["figures"]["preferred"] for p in result["differences"] if (p["model"], p["baseline"]) == ("lora", "base")
    ]
    assert pair["value"] == pytest.approx(values["lora"] - values["base"])
    assert evaluate_main(["--blind_results", *paths, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "39 judgements of 24 questions by Ann, results" in printed and "agree in 33.3% of 15 cases" in printed
    assert (tmp_path / "out" / "evaluation.png").exists()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["figures"] == result["figures"]


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda r: r.pop("judge"), "holds no results"),
        (lambda r: r["judgements"].append(r["judgements"][0]), "judgement 3 is of no question of the sheet, or of one"),
        (lambda r: r["judgements"][0].update(question=30), "judgement 1 is of no question"),
        (lambda r: r["judgements"][0].update(chosen="nobody"), "chose none of the sheet's models"),
        (lambda r: r["judgements"][0].update(order=["lora"]), "has other models than the sheet"),
        (lambda r: r.update(judgements=[]), "no question was judged yet"),
    ],
)
def test_damaged_results_are_refused(change, error, page, tmp_path):
    results = results_of(sheet_of(page), {0: 1, 1: 0}, "me")
    good, path = tmp_path / "good.json", tmp_path / "results.json"
    good.write_text(json.dumps(results))
    with pytest.raises(InputError, match="are both of judge 'me'"):
        count_results([str(good), str(good)])
    change(results)
    path.write_text(json.dumps(results))
    with pytest.raises(InputError, match=error):
        count_results(str(path))
    path.write_text(json.dumps(results_of(sheet_of(page), {0: 1}, "you") | {"sheet": "another"}))
    with pytest.raises(InputError, match="is of another sheet"):
        count_results([str(good), str(path)])


@pytest.mark.parametrize(
    "words, error",
    [
        ("--answers FILE --blind_sheet sheet.html --stemmer", "--stemmer: no effect with --blind_sheet"),
        ("--blind_sheet sheet.html", "--blind_sheet belongs to --answers"),
        ("--blind_results x.json --answers FILE", "--answers: no effect with --blind_results"),
        ("--blind_results missing.json", "--blind_results missing.json"),
        ("--answers FILE --blind_sheet FILE", "does not end in .html"),
        ("--answers ONE --blind_sheet sheet.html", "--blind_sheet compares 2 to 26 models: the answers are of 1"),
        ("--answers IDS --blind_sheet sheet.html", "no question to show on --blind_sheet"),
    ],
)
def test_wrong_flags_are_one_line(words, error, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_answers(tmp_path / "FILE", 1)
    (tmp_path / "FILE").rename("FILE.jsonl")
    (tmp_path / "ONE.jsonl").write_text('{"question": "q", "answers": "a"}\n')
    (tmp_path / "IDS.jsonl").write_text('{"id": 1, "answers": {"a": "a", "b": "b"}}\n')
    words = re.sub("(FILE|ONE|IDS)", r"\1.jsonl", words).split()
    try:
        code = evaluate_main(words)
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr().err
    assert code == 2 and error in printed and len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "sheet.html").exists()
