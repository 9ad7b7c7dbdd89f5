"""Evaluation over several files, behind a system message, and on other text; full models are refused early."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_instruct.adapters.answer_metrics import resamples
from open_instruct.adapters.forgetting import windows
from open_instruct.evaluate_peft import main as evaluate
from open_instruct.study.measuring import other_losses
from tests.conftest import ROOT, TINY_MODEL, TINY_T5, write_conversations

SAMPLE = ROOT / "data" / "sample"


def result_of(folder: Path, *words: str) -> dict[str, Any]:
    """Evaluate into a folder; return evaluation.json."""
    assert evaluate([*words, "--output_dir", str(folder)]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def code_of(words: list[str]) -> int:
    """Return the exit code, also where the parser ends the process."""
    try:
        return evaluate(words)
    except SystemExit as end:
        return int(str(end.code))


def same_figures(found: Any, expected: Any) -> None:
    """Compare figures and intervals: rounding depends on the rows beside a row."""
    assert found.keys() == expected.keys()
    for name in found:
        for figure in found[name]:
            for key in ("value", "interval"):
                assert found[name][figure][key] == pytest.approx(expected[name][figure][key], rel=1e-4, abs=1e-6)


def test_each_of_several_files_is_measured_as_alone_and_all_together_as_one(trained, tmp_path):
    files = {
        skill: write_conversations(tmp_path / f"{skill}.jsonl", skill, 12, seed=5) for skill in ("reverse", "sort")
    }
    both = tmp_path / "both.jsonl"
    both.write_text("".join(path.read_text() for path in files.values()))
    common = ["--adapter", f"lora={trained / 'lora'}", "--metrics", "loss", "exact_match", "--max_new_tokens", "16"]
    words = [*common, "--file", str(files["reverse"]), "--file", f"unseen={files['sort']}"]
    several = result_of(tmp_path / "several", *words)
    assert several["files"] == {"reverse": str(files["reverse"]), "unseen": str(files["sort"])}
    for name, skill in (("reverse", "reverse"), ("unseen", "sort")):
        alone = result_of(tmp_path / skill, *common, "--file", str(files[skill]))
        assert alone["by_file"] == {} and several["by_file"][name]["rows"] == 12
        for part in ("figures", "differences_from_base"):
            same_figures(several["by_file"][name][part], alone[part])
    together = result_of(tmp_path / "together", *common, "--file", str(both))
    assert several["rows"] == together["rows"] == 24
    for part in ("figures", "differences_from_base"):
        same_figures(several[part], together[part])
    with pytest.raises(AssertionError):  # the files differ
        same_figures(several["by_file"]["unseen"]["figures"], several["by_file"]["reverse"]["figures"])
    text = (tmp_path / "several" / "evaluation.md").read_text()
    assert "24 rows of 2 files" in text and "unseen (12 rows" in text and "| lora less base |" in text
    sizes = [(tmp_path / name / "evaluation.png").stat().st_size for name in ("several", "sort")]
    assert sizes[0] > sizes[1] > 5000


def test_a_system_message_stands_before_conversations_that_have_none(trained, tmp_path, capsys):
    rows = [json.loads(line) for line in (SAMPLE / "heldout.jsonl").read_text().splitlines()[:6]]
    rows[0]["messages"] = [{"role": "system", "content": "Reverse the words."}, *rows[0]["messages"]]
    own, written = tmp_path / "own.jsonl", tmp_path / "written.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    system = {"role": "system", "content": "Sort the words."}
    with_it = [rows[0], *({**row, "messages": [system, *row["messages"]]} for row in rows[1:])]
    written.write_text("".join(json.dumps(row) + "\n" for row in with_it))
    common = ["--adapter", f"lora={trained / 'lora'}", "--metrics", "loss", "exact_match", "--max_new_tokens", "8"]
    flag = result_of(tmp_path / "flag", *common, "--file", str(own), "--system", "Sort the words.")
    by_hand = result_of(tmp_path / "by-hand", *common, "--file", str(written))
    without = result_of(tmp_path / "without", *common, "--file", str(own))
    assert flag["system"] == "Sort the words." and by_hand["system"] is None
    same_figures(flag["figures"], by_hand["figures"])
    assert flag["figures"]["base"]["loss"]["value"] != pytest.approx(without["figures"]["base"]["loss"]["value"], 1e-3)
    capsys.readouterr()
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text(
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
    )
    for more, reason in (
        (["--file", str(written), "--system", "Be brief."], "--system has no effect: every row has"),
        (["--file", str(own), "--system", "Be brief.", "--chat_template_name", str(deaf)], "leaves such a message out"),
        (["--file", str(own), "--system", " "], "--system is empty"),
        (["--lm_eval_tasks", "x", "--system", "Be brief."], "belong to --file"),
    ):
        assert code_of([*common, *more]) == 2
        assert reason in capsys.readouterr().err


def plain_sums(model: Any, rows: list[list[int]], longest: int) -> np.ndarray:
    """Summed loss and tokens of passages, each piece by itself in float64: [passages, 2]."""
    sums = []
    for ids in rows:
        total, first = 0.0, 1  # the first token that is still to be predicted
        while first < len(ids):
            piece = ids[first - 1 : first - 1 + longest]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([piece])).logits[0].double().log_softmax(-1)
            total -= sum(scores[i, token].item() for i, token in enumerate(piece[1:]))
            first += len(piece) - 1
        sums.append((total, len(ids) - 1))
    return np.array(sums)


def test_all_tokens_of_other_text_count_with_a_paired_interval(trained, tmp_path):
    """Against plain forward passes; the long line is computed in pieces, each token of it once."""
    lines = ["apple stone river", "", "the old tower stands " * 3, "a", "red green blue narrow open dry " * 200]
    text, rows = tmp_path / "other.txt", tmp_path / "other.jsonl"
    text.write_text("\n".join(lines))
    rows.write_text("".join(json.dumps({"text": line, "id": 5}) + "\n" for line in lines))
    common = ["--adapter", f"lora={trained / 'lora'}", "--file", str(SAMPLE / "heldout.jsonl"), "--max_samples", "5"]
    common += ["--model", f"plain={TINY_MODEL}", "--metrics", "loss"]
    found = result_of(tmp_path / "lines", *common, "--other_text", str(text))
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    ids = [ids for ids in tokenizer([line for line in lines if line])["input_ids"] if len(ids) > 1]
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()
    limit = base.config.max_position_embeddings
    assert max(map(len, ids)) > limit
    sums = {"base": plain_sums(base, ids, limit)}
    cut = plain_sums(base, [row[:limit] for row in ids], limit)  # as if the rest of the long line were left out
    sums["lora"] = plain_sums(PeftModel.from_pretrained(base, trained / "lora").eval(), ids, limit)
    losses = {name: each[:, 0].sum() / each[:, 1].sum() for name, each in sums.items()}
    for name, loss in losses.items():
        assert found["figures"][name]["other_text_loss"]["value"] == pytest.approx(loss, rel=1e-4)
        assert found["figures"][name]["other_text_perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert found["figures"]["plain"]["other_text_loss"] == found["figures"]["base"]["other_text_loss"]
    assert found["other_text"] == {"file": str(text), "passages": len(ids), "tokens": sum(len(row) - 1 for row in ids)}
    change = found["differences_from_base"]["lora"]["other_text_loss"]
    drawn = [
        (sums["lora"][draw, 0].sum() - sums["base"][draw, 0].sum()) / sums["base"][draw, 1].sum()
        for draw in resamples(len(ids), 42)
    ]
    assert change["value"] == pytest.approx(losses["lora"] - losses["base"], abs=1e-4)
    assert change["interval"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=1e-4)
    assert cut[:, 0].sum() / cut[:, 1].sum() != pytest.approx(losses["base"], rel=1e-4)
    assert "| other_text_loss |" in (tmp_path / "lines" / "evaluation.md").read_text()
    again = result_of(tmp_path / "rows", *common, "--other_text", str(rows))
    assert again["figures"] == found["figures"]


def test_pieces_of_a_passage_predict_each_token_once():
    for length in range(2, 30):
        for longest in range(2, 12):
            pieces = windows(list(range(length)), longest)
            assert [token for piece in pieces for token in piece[1:]] == list(range(1, length))
            assert all(2 <= len(piece) <= longest for piece in pieces)


def test_a_study_counts_all_tokens_of_plain_text(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    path = tmp_path / "other.txt"
    path.write_text("apple stone river\n\n" + "red green blue " * 20 + "\n")
    study: Any = SimpleNamespace(other_text=path)
    ids = tokenizer([line for line in path.read_text().splitlines() if line])["input_ids"]
    found = np.array(other_losses(study, model, tokenizer, 16))
    assert found[:, 1].tolist() == [len(row) - 1 for row in ids]
    assert found == pytest.approx(plain_sums(model, ids, 16), rel=1e-4)


def test_other_text_that_is_none_is_refused(trained, tmp_path, capsys):
    empty, wide, null = tmp_path / "empty.txt", tmp_path / "wide.txt", tmp_path / "null.jsonl"
    empty.write_text("\n \n")
    wide.write_bytes("words".encode("utf-16"))
    null.write_text('{"text": 5}\n')
    common = ["--file", str(SAMPLE / "heldout.jsonl"), "--max_samples", "2"]
    for model, file, reason in (
        (TINY_MODEL, empty, "holds no text"),
        (TINY_MODEL, wide, "give a text in UTF-8"),
        (TINY_MODEL, null, "`text` is a number"),
        (TINY_MODEL, SAMPLE / "heldout.jsonl", "no column `text`"),
        (TINY_MODEL, tmp_path / "nowhere.jsonl", "nowhere.jsonl"),
        (TINY_T5, ROOT / "LICENSE", "causal language models"),
    ):
        assert evaluate(["--model_name_or_path", str(model), *common, "--other_text", str(file)]) == 2
        error = capsys.readouterr().err
        assert reason in error and "Traceback" not in error


def test_names_of_files_are_checked(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(SAMPLE / "heldout.jsonl", tmp_path / name / "heldout.jsonl")
    first, second = (str(tmp_path / name / "heldout.jsonl") for name in ("a", "b"))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "a", "answer": "b"}\n')
    base = ["--model_name_or_path", str(TINY_MODEL)]
    for words, reason in (
        ([*base, "--file", first, "--file", second], "two files are named 'heldout'"),
        ([*base, "--file", f"a|b={first}"], "give NAME=FILE"),
        ([*base, "--file", f"x={tmp_path / 'nowhere.jsonl'}"], "nowhere.jsonl"),
        (["--answers", str(answers), "--file", first, "--file", second], "--answers takes one --file"),
        (["--answers", str(answers), "--file", f"x={first}"], "--answers takes one --file"),
    ):
        assert code_of(words) == 2
        assert reason in capsys.readouterr().err


def test_a_full_model_that_does_not_fit_is_said_before_any_weights_are_read(trained, tmp_path, capsys):
    """The base's weights are garbage here: who reads them says so."""
    base, short = tmp_path / "base", tmp_path / "short"
    shutil.copytree(TINY_MODEL, base)
    (base / "model.safetensors").write_bytes(b"garbage")
    shutil.copytree(TINY_MODEL, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))
    empty = tmp_path / "empty"
    shutil.copytree(TINY_MODEL, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    common = ["--model_name_or_path", str(base), "--file", str(SAMPLE / "heldout.jsonl"), "--max_samples", "4"]
    other = ["--other_text", str(ROOT / "LICENSE")]
    words = f"words={ROOT / 'assets' / 'lookup-model'}"
    for more, reason in (
        (["--model", words], "--model words writes answers in other tokens"),
        (["--model", words, "--metrics", "exact_match", *other], "writes --other_text in other tokens"),
        (["--model", f"short={short}"], f"model {short}"),
        (["--model", f"empty={empty}"], f"model folder {empty} holds no weights"),
        (["--model", f"fits={TINY_MODEL}"], f"model {base} can't be loaded"),
        ([], f"model {base} can't be loaded"),
    ):
        assert evaluate([*common, *more]) == 2
        error = capsys.readouterr().err
        assert reason in error and "Traceback" not in error
