"""A study's figures and pages, on invented trials: intervals, choices, fronts, and what the report makes of them."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from open_instruct import bootstrap
from open_instruct.adapters.answer_scores import Measures
from open_instruct.bootstrap import Resampling
from open_instruct.errors import InputError
from open_instruct.study import config, figures, report
from open_instruct.study.answers import score_all
from open_instruct.study.config import Study
from open_instruct.study.figures import StudyFigures, choose_params, pair_differences, pareto_front
from open_instruct.study.results import StudyResults, TrialResult
from open_instruct.study.sentences import summarise


def clear_pairs(losses: dict[str, np.ndarray]) -> dict[tuple[str, str], bool]:
    """Return which pairs differ by more than chance."""
    resampling = Resampling(np.full(losses["a"].shape[1], 10))
    return {(pair.better, pair.worse): pair.clear for pair in pair_differences(losses, resampling)}


def test_intervals_tell_a_difference_from_chance():
    """Rows vary by far more than methods do; pairing finds the difference that is there, and none where none is."""
    rng = np.random.default_rng(0)
    rows = rng.gamma(2, 5, 200)
    noise = lambda: rng.normal(0, 0.5, (3, 200))  # noqa: E731
    assert clear_pairs({"a": rows + noise(), "b": rows + 0.4 + noise()}) == {("a", "b"): True}
    assert list(clear_pairs({"a": rows + noise(), "b": rows + noise()}).values()) == [False]


def test_intervals_hold_what_they_promise():
    """Of 200 pairs of equal methods about 5 % are called different; unpaired rows would call more or fewer."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(200):
        rows = rng.gamma(2, 5, 60)
        losses = {"a": (rows + rng.normal(0, 1, 60))[None], "b": (rows + rng.normal(0, 1, 60))[None]}
        wrong += any(clear_pairs(losses).values())
    assert wrong <= 15  # one side of a two-sided 5 %: about 5 to 10


def test_a_draw_is_the_mean_over_the_rows_and_seeds_that_it_takes(monkeypatch):
    """Row by row and seed by seed, repeated ones as often as they are drawn."""
    monkeypatch.setattr(bootstrap, "NUM_DRAWS", 50)
    rng = np.random.default_rng(2)
    num_tokens, losses = rng.integers(1, 9, 7), rng.gamma(2, 5, (3, 7))
    resampling = Resampling(num_tokens)
    draws = resampling.draws(losses)
    seed_counts = np.random.default_rng([0x5EED, 3]).multinomial(3, [1 / 3] * 3, 50)
    for b in range(50):
        rows = np.repeat(np.arange(7), resampling.row_counts[b].astype(int))
        seeds = np.repeat(np.arange(3), seed_counts[b])
        assert len(rows) == 7 and len(seeds) == 3
        assert draws[b] == pytest.approx(losses[np.ix_(seeds, rows)].mean(0).sum() / num_tokens[rows].sum())
    assert resampling.mean(losses) == pytest.approx(losses.mean(0).sum() / num_tokens.sum())
    assert not np.allclose(draws, resampling.mean(losses))
    shifted = Resampling(num_tokens).draws(losses + 2 * num_tokens)  # 2 nats more for every token, in every draw
    assert np.allclose(shifted - draws, 2)


def test_an_interval_is_the_middle_share():
    values = np.arange(1001)
    assert bootstrap.interval(values) == pytest.approx([25, 975])
    assert bootstrap.interval(list(values), 0.5) == pytest.approx([250, 750])


def test_a_front_holds_what_nothing_beats():
    points = {"cheap": (1, 5.0), "good": (9, 1.0), "beaten": (9, 2.0), "middle": (4, 3.0)}
    assert pareto_front(points) == ["cheap", "middle", "good"]
    assert pareto_front({"twin": (1, 2.0), "other twin": (1, 2.0)}) == ["twin", "other twin"]
    assert pareto_front({**points, "broken": (5, math.nan)}) == ["cheap", "middle", "good"]


def figures_of(losses: list[float]) -> dict:
    """Return what a trial measures: 4 rows of 10 tokens, half for choosing, half for the test."""
    return {
        "device": "cpu",
        "rows": [[loss, 10] for loss in losses],
        "choosing": [0, 1],
        "test": [2, 3],
        "exact": [1.0, 0.0],
        "answers": [],
        "references": [],
        "other": [[losses[2] + 5, 10]],
    }


def trial_result(
    name: str, params: dict, seed: int, losses: list[float], failed: str | None = None, full_length: bool = True
) -> TrialResult:
    """Return an invented trial."""
    data = {"train": "abc"}
    summary = {
        "study": figures_of(losses), "data": data, "steps": 6, "tokens": 100, "trainable_parameters": 10,
        "total_parameters": 1000, "adapter_bytes": 40, "wall_seconds": 1.5, "peak_memory_mb": 200.0,
        "base_eval_loss": 4.0, "initial_eval_loss": 4.0,
    }  # fmt: skip
    return TrialResult(
        spec_name=name,
        params=params,
        seed=seed,
        full_length=full_length,
        command=f"python run.py --name {name} --seed {seed}",
        folder=f"trials/{name}-{seed}",
        failed=failed,
        summary={"failed": failed} if failed else summary,
        base={"study": figures_of([40.0] * 4), "data": data, "quantised": None},
        learning_rate=params.get("learning_rate", 0.1),
        curve=[(0, 4.0), (6, losses[0])],
    )


def results_of(trials: list[TrialResult], num_missing: int = 0) -> StudyResults:
    """Return the results of invented trials."""
    return StudyResults(trials, num_missing, {trial.spec_name: trial.base for trial in trials if not trial.failed}, [])


def analyse(results: StudyResults) -> StudyFigures:
    """Return the figures of invented trials, with exact match alone."""
    return figures.analyse(results, score_all(results, Measures(())))


def study_in(folder: Path, methods: list[str]) -> Study:
    """Return a study whose report goes into a folder."""
    path = folder / "study.yaml"
    content = {"name": "a <b>bold<b> name", "output_dir": str(folder), "methods": methods, "seeds": [1, 2]}
    path.write_text(yaml.safe_dump(content))
    return config.read_study(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_report_never_chooses_a_loss_that_is_not_finite(bad):
    for order in ([bad, 3.0, 2.0], [2.0, bad, 3.0], [3.0, 2.0, bad]):
        trials = [trial_result("ia3", {"learning_rate": loss}, 1, [loss] * 4) for loss in order]
        assert [trial.params for trial in choose_params(trials)] == [{"learning_rate": 2.0}]
    assert choose_params([trial_result("ia3", {}, 1, [bad] * 4)]) == []


def test_a_point_is_chosen_over_the_seeds_that_all_have():
    trials = [
        trial_result("ia3", {"learning_rate": 1}, 1, [3.0] * 4),
        trial_result("ia3", {"learning_rate": 2}, 1, [2.0] * 4),
        trial_result("ia3", {"learning_rate": 2}, 2, [9.0] * 4),
        trial_result("ia3", {"learning_rate": 3}, 1, [1.0] * 4),
        trial_result("ia3", {"learning_rate": 3}, 2, [1.0] * 4, failed="diverged"),
        trial_result("ia3", {"learning_rate": 4}, 1, [0.1] * 4, full_length=False),
    ]
    assert [(trial.params["learning_rate"], trial.seed) for trial in choose_params(trials)] == [(2, 1), (2, 2)]


def test_a_method_of_nan_is_a_failed_one_and_no_method_at_all_is_an_error():
    good = [trial_result("ia3", {}, seed, [20.0] * 4) for seed in (1, 2)]
    broken = [trial_result("lora", {}, seed, [math.nan] * 4) for seed in (1, 2)]
    found = analyse(results_of([*broken, *good]))
    assert [method.name for method in found.methods] == ["ia3"] and not found.pairs
    assert [method.name for method in found.failed_methods] == ["lora"]
    assert any("No point of lora finished with a finite loss" in text for text in summarise(found, 0, 1))
    with pytest.raises(InputError, match="no method yet"):
        analyse(results_of(broken))


def test_a_nan_on_the_test_rows_alone_ranks_last():
    odd = trial_result("lora", {}, 1, [1.0, 1.0, math.nan, 1.0])
    found = analyse(results_of([odd, trial_result("ia3", {}, 1, [20.0] * 4)]))
    assert [method.name for method in found.methods] == ["ia3", "lora"]
    assert [(pair.better, pair.worse, pair.clear) for pair in found.pairs] == [("ia3", "lora", False)]
    assert summarise(found, 0, 1)[1].startswith("ia3 has the lowest test loss")


def test_report_json_keeps_its_names(tmp_path):
    """Programs read them, and older studies have them."""
    trials = [
        trial_result(name, {}, seed, [loss] * 4) for name, loss in (("ia3", 20.0), ("lora", 30.0)) for seed in (1, 2)
    ]
    trials.append(trial_result("full", {}, 1, [1.0] * 4, failed="diverged"))
    report.write_report(study_in(tmp_path, ["ia3", "lora", "full"]), results_of(trials, num_missing=1), 1, Measures(()))
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content) == {
        "name", "sentences", "base", "test_rows", "choosing_rows", "test_tokens", "questions", "other_tokens",
        "methods", "pairs", "answers", "quantised", "unequal_tokens", "on_cpu", "trials",
    }  # fmt: skip
    assert set(content["methods"][0]) == {
        "name", "works", "point", "learning_rate", "seeds", "trials", "failed", "searched_tokens", "test", "less_base",
        "by_seed", "exact", "trained", "total", "bytes", "seconds", "memory_mb", "forgetting", "forgetting_interval",
        "curves", "rates", "recipe", "commands",
    }  # fmt: skip
    assert content["methods"][2] == {"name": "full", "failed": 1, "trials": 1, "works": False}
    assert set(content["pairs"][0]) == {"better", "worse", "value", "interval", "clear"}
    assert set(content["base"]) == {"loss", "exact", "other"}
    assert content["methods"][0]["test"]["value"] == 2.0 and content["base"]["loss"] == 4.0
    assert content["sentences"][0] == "The study is not complete: 1 of the trials that are known so far have not run."
    head = (tmp_path / "trials.csv").read_text().splitlines()[0]
    assert head == (
        "method,point,seed,steps,learning_rate,choosing_loss,test_loss,exact_match,seconds,peak_memory_mb,failed,"
        "trainable_parameters,adapter_bytes,tokens,base_eval_loss,initial_eval_loss,other_loss,folder,command"
    )


def test_pages_escape_what_users_write(tmp_path):
    """A name with tags stays text in HTML; a bar stays in its cell in Markdown."""
    names = ["<script>alert('1')</script>", "bar|bar"]
    trials = [trial_result(name, {}, seed, [20.0] * 4) for name in names for seed in (1, 2)]
    report.write_report(study_in(tmp_path, ["ia3", "lora"]), results_of(trials), 1, Measures(()))
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<script" not in page and "<b>" not in page
    assert "<script>alert('1')</script>" in html.unescape(page)
    assert len(re.findall(r'<img src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}" alt="', page)) == 6
    assert not re.search(r"(src|href)=\"?(http|//|\w+\.)", page)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")]
    num_bars = {len(re.findall(r"(?<!\\)\|", row)) for row in rows if "bar" in row or row.startswith("| base model")}
    assert num_bars == {5, 6, 12, 13} and any("bar\\|bar" in row for row in rows)
