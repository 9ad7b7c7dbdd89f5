"""The studies in configs/studies can be read; the one for a GPU dry-runs with the bundled model and data instead."""

import json
from pathlib import Path

import pytest

from open_instruct import study_peft
from open_instruct.adapters.answer_metrics import exact_matches
from open_instruct.data.chat import set_chat_template
from open_instruct.model.loading import load_tokenizer
from open_instruct.study.config import read_study
from open_instruct.study.search import next_trials
from tests.conftest import ROOT, TINY_MODEL

STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_each_can_be_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(path)
    assert all(next_trials(study, spec, {}) for spec in study.specs)


@pytest.fixture
def metamathqa(tmp_path, monkeypatch):
    """The study with the bundled model, and bundled rows in MetaMathQA's columns."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / "studies" / "metamathqa.yaml").read_text()
    replaced = {"meta-llama/Llama-3.2-3B": str(TINY_MODEL), "name: metamathqa": f"name: m\noutput_dir: {tmp_path}/out"}
    for name, file in (("train", "train"), ("gsm8k_test", "heldout")):
        lines = (ROOT / "data" / "sample" / f"{file}.jsonl").read_text().splitlines()[:80]
        talks = [json.loads(line)["messages"] for line in lines]
        rows = [{"query": talk[0]["content"], "response": talk[-1]["content"]} for talk in talks]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        replaced[f"data/metamathqa/{name}.jsonl"] = str(tmp_path / f"{name}.jsonl")
    for old, new in replaced.items():
        assert text.count(old) >= 1
        text = text.replace(old, new)
    (tmp_path / "study.yaml").write_text(text)
    return tmp_path / "study.yaml"


def test_metamathqa_dry_runs(metamathqa, train, capsys):
    """The study as a whole, and each of its trials."""
    assert study_peft.main(["--config", str(metamathqa), "--dry_run"]) == 0
    assert capsys.readouterr().out.count("finetune_peft.py --model_name_or_path") == 6
    study = read_study(metamathqa)
    for spec in study.specs:
        (trial,) = next_trials(study, spec, {})
        words = trial.words
        at = words.index("--train_file")
        run = train(spec.name, *words[:at], *words[at + 2 :], "--dry_run", data=Path(words[at + 1]))
        assert run.code == 0, run.err
        assert "5,000 of 4 examples" in run.out, run.out


def test_metamathqa_writes_questions_and_finds_answers_as_pefts_comparison(metamathqa):
    study = read_study(metamathqa)
    tokenizer = load_tokenizer(str(TINY_MODEL))
    set_chat_template(tokenizer, str(ROOT / study.flags["chat_template_name"]), False)
    question = (ROOT / study.flags["template"]).read_text().replace("{query}", "1 + 1?")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "It is 2."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    body = "Question: 1 + 1? Think step by step.\nAnswer:It is 2."
    assert text == f"{tokenizer.bos_token}{body}{tokenizer.eos_token}"
    answers = ["So 3.\nThe answer is: 1,200", "#### 7", "The answer is: 8"]
    found = exact_matches(answers, ["x\n#### 1200", "y\n#### 7", "#### 9"], study.answer_regex, study.normalise)
    assert found.tolist() == [1, 1, 0]
