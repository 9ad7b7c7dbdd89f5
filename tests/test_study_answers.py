"""Figures of the answers of a study's trials: against the reference packages, restarted, and with wrong input."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from open_instruct import bootstrap, study_peft
from open_instruct.adapters.answer_metrics import Bleu
from open_instruct.adapters.answer_scores import Measures
from open_instruct.adapters.own_metrics import load_metric
from open_instruct.bootstrap import Resampling
from open_instruct.study.answers import AnswerFigure, StudyScores, answer_figures, score_all
from open_instruct.study.results import StudyResults, TrialResult
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
        figures |= {"answers": texts, "references": REFERENCES, "exact": exact}
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
    "unknown report.metric, did you mean metrics?": {"metric": ["bleu"]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_wrong_report_is_said_before_the_first_trial(message, data, tmp_path, capsys):  # noqa: F811
    (tmp_path / "mine.py").write_text("def bleu(answer, references):\n    return 1\n")
    report = dict(BAD[message])
    if isinstance(report.get("metrics"), list):
        report["metrics"] = [word.replace("MINE", str(tmp_path / "mine.py")) for word in report["metrics"]]
    for words in ([], ["--dry_run"]):
        assert study_peft.main(["--config", str(write_study(tmp_path, data, report=report)), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "study").exists()


@pytest.mark.parametrize(("package", "metric"), [("rouge_score", "rouge"), ("sacrebleu", "bleu")])
def test_a_missing_package_is_said_before_the_first_trial(package, metric, data, tmp_path, capsys, monkeypatch):  # noqa: F811
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
