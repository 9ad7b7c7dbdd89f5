"""Figures of the answers of a study's trials: against the reference packages, restarted, and with wrong input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from open_instruct import bootstrap, study_peft
from open_instruct.adapters.answer_metrics import Bleu
from open_instruct.adapters.answer_scores import Measures
from open_instruct.adapters.own_metrics import load_metric
from open_instruct.bootstrap import Resampling
from open_instruct.study.answers import AnswerFigure, StudyScores, answer_figures, score_all
from open_instruct.study.measuring import file_questions, questions_hash
from open_instruct.study.results import StudyResults, TrialResult
from tests.conftest import TINY_MODEL
from tests.test_study import data, trials_of, write_study  # noqa: F401 - a fixture
from tests.test_study_figures import trial_result

REFERENCES = ["the cat sat on the mat", "a dog ran", "red green blue stone", "one two three"] * 10
WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "red", "green", "blue", "stone", "one", "two", "three"]
OWN = """def common(answer, references):
    return len(set(answer.split()) & set(references[0].split()))
"""
ROUGE = ("rouge1", "rouge2", "rougeL")


def spoilt(share: float, seed: int) -> list[str]:
    """The references with a share of their words replaced."""
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split()) for text in REFERENCES
    ]


def with_answers(name: str, seed: int, answers: list[str]) -> TrialResult:
    """An invented trial with answers; its base answers nothing but `the`."""
    result = trial_result(name, {}, seed, [20.0] * 4)
    for figures, texts in ((result.summary["study"], answers), (result.base["study"], ["the"] * 40)):
        exact = [float(a == b) for a, b in zip(texts, REFERENCES, strict=True)]
        figures |= {"answers": texts, "references": REFERENCES, "exact": exact, "files": {}}
    return result


@pytest.fixture
def measures(tmp_path) -> Measures:
    (tmp_path / "mine.py").write_text(OWN)
    return Measures(["rouge", "bleu", "chrf"], [load_metric(f"{tmp_path / 'mine.py'}:common")])


def figures_of(trials: list[TrialResult], measures: Measures) -> dict[str, AnswerFigure]:
    """The figures of invented trials, all of them chosen."""
    scores = score_all(StudyResults(trials, 0, {trial.spec_name: trial.base for trial in trials}, []), measures)
    chosen: dict[str, list[TrialResult]] = {}
    for trial in trials:
        chosen.setdefault(trial.spec_name, []).append(trial)
    return {figure.figure: figure for figure in answer_figures(chosen, scores)}


def by_packages(answers: list[str]) -> dict[str, float]:
    """All figures by the packages themselves, and the user's function in other words."""
    scorer = RougeScorer(ROUGE)
    rouge = [scorer.score(reference, answer) for reference, answer in zip(REFERENCES, answers, strict=True)]
    pairs = list(zip(answers, REFERENCES, strict=True))
    return {
        "exact_match": float(np.mean([answer == reference for answer, reference in pairs])),
        **{kind: float(np.mean([row[kind].fmeasure for row in rouge])) for kind in ROUGE},
        "common": float(np.mean([sum(word in reference.split() for word in set(a.split())) for a, reference in pairs])),
        "bleu": sacrebleu.corpus_bleu(answers, [REFERENCES]).score,
        "chrf": sacrebleu.corpus_chrf(answers, [REFERENCES]).score,
    }


def test_figures_equal_the_packages_and_intervals_a_plain_bootstrap(measures, monkeypatch):
    monkeypatch.setattr(bootstrap, "NUM_DRAWS", 300)
    texts = {("a", 1): spoilt(0.2, 1), ("a", 2): spoilt(0.3, 2), ("b", 1): spoilt(0.6, 3), ("b", 2): spoilt(0.7, 4)}
    figures = figures_of([with_answers(name, seed, answers) for (name, seed), answers in texts.items()], measures)
    expected = {key: by_packages(answers) for key, answers in texts.items()}
    base = by_packages(["the"] * 40)
    assert list(figures) == ["exact_match", *ROUGE, "common", "bleu", "chrf"]
    for name, figure in figures.items():
        assert figure.num_questions == 40 and figure.base == pytest.approx(base[name])
        assert [method.name for method in figure.methods] == ["a", "b"]
        for method in figure.methods:
            values = [expected[method.name, seed][name] for seed in (1, 2)]
            assert method.by_seed == pytest.approx(values) and method.value == pytest.approx(np.mean(values))
            assert method.less_base == pytest.approx(np.mean(values) - base[name])
            assert method.interval[0] < method.value < method.interval[1]
        assert figure.pairs[0].clear and figure.pairs[0].value == pytest.approx(
            figure.methods[0].value - figure.methods[1].value
        )
    # Draw by draw: rows and seeds taken as often as drawn, BLEU of what was taken.
    resampling = Resampling(np.ones(40))
    shares = bootstrap.seed_shares(2)
    drawn = []
    for b in range(300):
        rows = np.repeat(np.arange(40), resampling.row_counts[b].astype(int))
        references = [[REFERENCES[i] for i in rows]]
        of_seed = [sacrebleu.corpus_bleu([texts["a", seed][i] for i in rows], references).score for seed in (1, 2)]
        drawn.append(float(shares[b] @ of_seed))
    bleu = figures["bleu"].methods[0]
    assert bleu.interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())
    assert bleu.interval != pytest.approx(np.quantile(drawn, [0.05, 0.95]).tolist())


def test_a_statistic_that_is_a_mean_has_the_draws_of_the_mean():
    values = np.random.default_rng(0).random((3, 20))
    resampling = Resampling(np.ones(20))
    statistics = [lambda rows, row=row: float(row[rows].mean()) for row in values]
    draws = resampling.draws_of_statistics(statistics)
    assert np.allclose(draws, resampling.draws(values))
    assert not np.allclose(resampling.draws_of_statistics(statistics[::-1]), draws)  # seeds are told apart


def test_differences_are_paired_by_question(measures):
    """Questions differ by far more than methods do: one word that the other lacks, in every answer, is seen."""
    longer = [f"{text} x" for text in spoilt(0.5, 5)]
    shorter = [text.rsplit(" ", 1)[0] for text in longer]
    figure = figures_of([with_answers("long", 1, longer), with_answers("short", 1, shorter)], measures)["rouge1"]
    low, high = figure.methods[0].interval
    assert [method.name for method in figure.methods] == ["short", "long"] and figure.pairs[0].clear
    assert low < figure.methods[1].value < high  # the intervals of the two overlap: unpaired nothing would be seen
    same = [with_answers("a", 1, spoilt(0.5, 6)), with_answers("b", 1, spoilt(0.5, 7))]
    assert not figures_of(same, measures)["rouge1"].pairs[0].clear


def test_bleu_of_drawn_rows_is_computed_anew():
    """No mean of the rows' own BLEU."""
    counted = Bleu.count(spoilt(0.3, 1), [[text] for text in REFERENCES])
    drawn = Resampling(np.ones(40)).draws_of_statistics([counted.score])
    assert abs(np.mean(drawn) - counted.score(np.arange(40))) < 5 < abs(np.mean(drawn) - counted.each.mean())


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:  # noqa: F811
    """A study of two methods without further figures."""
    folder = tmp_path_factory.mktemp("answers")
    path = write_study(folder, data, methods=["ia3", "lora"], report={"questions": 6, "max_new_tokens": 12})
    assert study_peft.main(["--config", str(path)]) == 0
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def again(folder: Path, data: Path, *words: str, **report) -> int:  # noqa: F811
    """Run the study in a folder again, with another report."""
    report = {"questions": 6, "max_new_tokens": 12} | report
    return study_peft.main(["--config", str(write_study(folder, data, methods=["ia3", "lora"], report=report)), *words])


def test_figures_are_added_to_a_finished_study_without_training(copied, data, capsys):  # noqa: F811
    (copied / "mine.py").write_text(OWN)
    times = {path: path.stat().st_mtime_ns for path in copied.glob("study/**/summary.json")}
    assert len(times) == 2
    assert again(copied, data, metrics=["rouge", "bleu", "chrf", f"{copied / 'mine.py'}:common"]) == 0
    assert "2 trials, 2 of them done before" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in times}
    report = json.loads((copied / "study" / "report.json").read_text())
    figures = {figure["figure"]: figure for figure in report["answers"]}
    assert list(figures) == ["exact_match", *ROUGE, "common", "bleu", "chrf"]
    rows = {row["method"]: row for row in trials_of(copied / "study")}
    for method in figures["chrf"]["methods"]:
        (summary,) = copied.glob(f"study/trials/{method['name']}-*/summary.json")
        study = json.loads(summary.read_text())["study"]
        assert len(study["answers"]) == 6 == len(study["references"])
        chrf = sacrebleu.corpus_chrf(study["answers"], [study["references"]]).score
        assert method["value"] == pytest.approx(chrf) == pytest.approx(float(rows[method["name"]]["chrf"]), abs=1e-4)
    page, markdown = ((copied / "study" / name).read_text() for name in ("report.html", "report.md"))
    for text in (page, markdown):
        assert "Answers to test questions" in text and "rougeL" in text and "common" in text
    assert (copied / "study" / "answers.png").read_bytes().startswith(b"\x89PNG")
    assert sum("has the highest" in sentence for sentence in report["sentences"]) == 6


@pytest.fixture(scope="module")
def with_files(data, tmp_path_factory) -> Path:  # noqa: F811
    """A study with two files of further questions: the held-out rows themselves, and rows of another skill."""
    folder = tmp_path_factory.mktemp("files")
    files = {"same": str(data / "heldout.jsonl"), "sort": str(data / "other.jsonl")}
    report = {"questions": 30, "max_new_tokens": 12, "metrics": ["chrf"], "files": files}
    path = write_study(folder, data, methods=["ia3", "lora"], seeds=[1, 2], report=report)
    assert study_peft.main(["--config", str(path)]) == 0
    return folder


def test_files_are_asked_as_held_out_rows_are(with_files, data):  # noqa: F811
    """The held-out rows have the same losses and answers as a file of their own."""
    for path in [*with_files.glob("study/trials/*/summary.json"), *with_files.glob("study/base-*.json")]:
        study = json.loads(path.read_text())["study"]
        assert [len(study["files"][name]["answers"]) for name in ("same", "sort")] == [30, 10]
        assert np.allclose(study["files"]["same"]["losses"], study["rows"], rtol=1e-4, atol=1e-5)
        same = study["files"]["same"]
        assert [same["answers"][i] for i in study["test"]] == study["answers"]
        assert [same["references"][i] for i in study["test"]] == study["references"]
        assert [same["references"][i] for i in study["choosing"]] != study["references"]


def test_figures_of_files_are_those_of_their_rows(with_files):
    report = json.loads((with_files / "study" / "report.json").read_text())
    figures = {(figure["asked"], figure["figure"]): figure for figure in report["answers"]}
    per_file = ["loss", "exact_match", "chrf"]
    expected = [("test rows", "exact_match"), ("test rows", "chrf")]
    assert list(figures) == [*expected, *((name, figure) for name in ("same", "sort") for figure in per_file)]
    rows = trials_of(with_files / "study")
    for method in figures["sort", "loss"]["methods"]:
        by_seed = []
        for row in [row for row in rows if row["method"] == method["name"]]:
            losses = json.loads((Path(row["folder"]) / "summary.json").read_text())["study"]["files"]["sort"]["losses"]
            by_seed.append(sum(loss for loss, _ in losses) / sum(count for _, count in losses))
            assert float(row["loss, sort"]) == pytest.approx(by_seed[-1], abs=1e-4)
        assert method["by_seed"] == pytest.approx(by_seed) and method["value"] == pytest.approx(np.mean(by_seed))
        assert method["interval"][0] < method["value"] < method["interval"][1]
    values = [method["value"] for method in figures["sort", "loss"]["methods"]]
    assert values == sorted(values)  # the lowest loss first, and the highest of other figures
    values = [method["value"] for method in figures["sort", "chrf"]["methods"]]
    assert values == sorted(values, reverse=True)
    assert sum("has the lowest loss, s" in sentence for sentence in report["sentences"]) == 2
    assert "chrf, sort" in (with_files / "study" / "report.md").read_text()


def test_other_files_are_not_compared(with_files, data, tmp_path, capsys):  # noqa: F811
    shutil.copytree(with_files, tmp_path, dirs_exist_ok=True)
    report = {"questions": 30, "max_new_tokens": 12, "files": {"same": str(data / "heldout.jsonl")}}
    path = write_study(tmp_path, data, methods=["ia3", "lora"], seeds=[1, 2], report=report)
    assert study_peft.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "files was" in error and "name another output_dir" in error and error.count("\n") == 1
    report["files"] |= {"sort": str(data / "other.jsonl")}
    write_study(tmp_path, data, methods=["ia3", "lora"], seeds=[1, 2], report=report)
    changed = next(tmp_path.glob("study/trials/lora-*/summary.json"))  # as if it had met other rows in that file
    content = json.loads(changed.read_text())
    content["data"]["file sort"] = "0"
    changed.write_text(json.dumps(content))
    assert study_peft.main(["--config", str(path), "--report_only"]) == 2
    assert "changed between trials" in capsys.readouterr().err


def test_a_system_message_stands_before_the_questions_of_files(data):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    study = SimpleNamespace(num_questions=3, system=None)
    plain = file_questions(study, str(data / "other.jsonl"), None, tokenizer)
    study.system = "stone apple"
    with_message = file_questions(study, str(data / "other.jsonl"), None, tokenizer)
    for without, question in zip(plain, with_message, strict=True):
        assert question.messages == [{"role": "system", "content": "stone apple"}, *without.messages]
        assert question.reference == without.reference
    assert questions_hash(plain) != questions_hash(with_message)


def test_exact_match_follows_the_expression_of_the_report(copied, data):  # noqa: F811
    """From the answers that were kept, with nothing run again."""
    assert again(copied, data, "--report_only", answer_regex="^(.)") == 0
    report = json.loads((copied / "study" / "report.json").read_text())
    (base,) = copied.glob("study/base-*.json")
    study = json.loads(base.read_text())["study"]
    first = [a[:1] == b[:1] for a, b in zip(study["answers"], study["references"], strict=True)]
    assert report["base"]["exact"] == pytest.approx(np.mean(first)) and np.mean(first) != np.mean(study["exact"])
    assert report["answers"][0]["base"] == report["base"]["exact"]


@pytest.mark.parametrize("words", [(), ("--report_only",)])
def test_trials_that_were_asked_otherwise_are_not_compared(words, copied, data, capsys):  # noqa: F811
    assert again(copied, data, *words, questions=5) == 2
    error = capsys.readouterr().err
    assert "questions was 6 and is 5" in error and "name another output_dir" in error and error.count("\n") == 1


def test_trials_of_an_older_version_have_exact_match_alone(copied, data, capsys):  # noqa: F811
    """They kept no answers."""
    for path in [*copied.glob("study/trials/*/summary.json"), *copied.glob("study/base-*.json")]:
        content = json.loads(path.read_text())
        for name in ("asked", "answers", "references"):
            del content["study"][name]
        path.write_text(json.dumps(content))
    assert again(copied, data) == 0
    report = json.loads((copied / "study" / "report.json").read_text())
    assert [figure["figure"] for figure in report["answers"]] == ["exact_match"]
    capsys.readouterr()
    assert again(copied, data, metrics=["chrf"]) == 2
    error = capsys.readouterr().err
    assert "no answers were kept" in error and error.count("\n") == 1


def test_a_function_that_fails_costs_no_trial(copied, data, capsys):  # noqa: F811
    mine = copied / "mine.py"
    mine.write_text("def bad(answer, references):\n    return 1 / 0\n")
    assert again(copied, data, metrics=[f"{mine}:bad"]) == 2
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "question 1, model" in error and error.count("\n") == 1
    mine.write_text("def bad(answer, references):\n    return 1\n")
    assert again(copied, data, "--report_only", metrics=[f"{mine}:bad"]) == 0


BAD = {
    "report.metrics 'rogue' is not known: choose exact_match, rouge": {"metrics": ["rogue"]},
    "report.metrics 'loss' is not known": {"metrics": ["loss"]},
    "report.metrics rouge: give a list": {"metrics": "rouge"},
    "one stands there twice": {"metrics": ["bleu", "bleu"]},
    "report.questions is 0: drop them": {"metrics": ["bleu"], "questions": 0},
    "report.metrics nowhere.py:f: no such file": {"metrics": ["nowhere.py:f"]},
    "has no function f: name one": {"metrics": ["MINE:f"]},
    "a figure has that name: rename": {"metrics": ["MINE:bleu"]},
    "report.similarity_model 5 is no text".replace("5", "'5'"): {"similarity_model": 5},
    "report.similarity_model ./nowhere": {"similarity_model": "./nowhere"},
    "report.files.a/b: give NAME": {"files": {"a/b": "x.jsonl"}},
    "give NAME=FILE, where NAME is letters": {"files": {"a b": "x.jsonl"}},
    "nowhere.jsonl": {"files": {"a": "nowhere.jsonl"}},
    "no answer to compare with": {"files": {"a": "QUESTIONS"}},
    "report.system belongs to report.files": {"system": "Be brief."},
    "report.files has no effect, as report.questions is 0": {"files": {"a": "x.jsonl"}, "questions": 0},
    "report.system has no effect: every row": {"files": {"a": "SYSTEM"}, "system": "Be brief."},
    "unknown report.metric, did you mean metrics?": {"metric": ["bleu"]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_report_is_said_before_the_first_trial(message, data, tmp_path, capsys):  # noqa: F811
    (tmp_path / "mine.py").write_text("def bleu(answer, references):\n    return 1\n")
    report = dict(BAD[message])
    turns = [{"role": role, "content": "red"} for role in ("system", "user", "assistant")]
    (tmp_path / "QUESTIONS.jsonl").write_text(json.dumps({"messages": turns[:2]}) + "\n")
    (tmp_path / "SYSTEM.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    if report.get("files", {}).get("a", "").isupper():
        report["files"] = {"a": str(tmp_path / f"{report['files']['a']}.jsonl")}
    if isinstance(report.get("metrics"), list):
        report["metrics"] = [word.replace("MINE", str(tmp_path / "mine.py")) for word in report["metrics"]]
    for words in ([], ["--dry_run"]):
        assert study_peft.main(["--config", str(write_study(tmp_path, data, report=report)), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "study").exists()


@pytest.mark.parametrize(("package", "metric"), [("rouge_score", "rouge"), ("sacrebleu", "bleu")])
def test_a_missing_package_is_said_first(package, metric, data, tmp_path, capsys, monkeypatch):  # noqa: F811
    for name in [name for name in sys.modules if name.split(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)  # as Python does where an import must fail
    path = write_study(tmp_path, data, report={"metrics": [metric]})
    assert study_peft.main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "pip install '.[eval]'" in error and error.count("\n") == 1 and not (tmp_path / "study").exists()


def test_scores_are_of_each_trial_once(measures):
    """Methods that share a base share its scores; a trial that failed has none."""
    trials = [with_answers("a", 1, spoilt(0.2, 1)), with_answers("b", 1, spoilt(0.2, 2))]
    failed = trial_result("a", {}, 2, [1.0] * 4, failed="diverged")
    base = trials[0].base
    scores = score_all(StudyResults([*trials, failed], 0, {"a": base, "b": base}, []), measures)
    assert isinstance(scores, StudyScores) and scores.bases["a"] is scores.bases["b"]
    assert set(scores.trials) == {trial.folder for trial in trials}
