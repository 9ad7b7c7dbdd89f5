"""Searches: the expected trials in the expected order, the same after a stop, and never a NaN before a loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from open_instruct.study import config, search
from open_instruct.study.config import MethodSpec, Study
from open_instruct.study.search import Trial, next_trials

RATE = {"low": 1e-3, "high": 1.0}
GRID = {"kind": "grid", "space": {"learning_rate": [0.1, 0.2], "weight_decay": [0.0, 0.5]}}
RANDOM = {
    "kind": "random",
    "points": 4,
    "space": {
        "learning_rate": RATE,
        "num_virtual_tokens": {"low": 1, "high": 100},
        "prompt_tuning_init": ["text", "random"],
    },
}
HALVING = {"kind": "halving", "points": 9, "eta": 3, "space": {"learning_rate": RATE}}


def read_study(folder: Path, search_settings: dict, methods: object, seeds: tuple[int, ...] = (1, 2)) -> Study:
    """Return a study of files that nobody opens."""
    content = {
        "name": "s",
        "flags": {"model_name_or_path": "m", "train_file": "t.jsonl", "max_train_steps": 9},
        "methods": methods,
        "search": search_settings,
        "seeds": list(seeds),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return config.read_study(path)


def only_spec(study: Study) -> MethodSpec:
    """Return the method of a study that has one."""
    (spec,) = study.specs
    return spec


def losses_of(trials: list[Trial], losses: list[float]) -> dict[str, float]:
    """Return losses by the trials' keys."""
    return {trial.key: loss for trial, loss in zip(trials, losses, strict=True)}


def num_steps(trial: Trial) -> int:
    """Return the steps of a trial's run."""
    return dict(trial.flags)["max_train_steps"]


def test_a_grid_is_every_point_with_every_seed(tmp_path):
    """The folder names too: a study that an older version began must find its finished trials."""
    study = read_study(tmp_path, GRID, {"ia3": None, "prompt_tuning": {"num_virtual_tokens": 5}})
    stage = next_trials(study, study.specs[0], {})
    assert [(trial.key, dict(trial.params), trial.seed) for trial in stage] == [
        ("ia3-0016d71f", {"learning_rate": 0.1, "weight_decay": 0.0}, 1),
        ("ia3-5b1f9d6a", {"learning_rate": 0.1, "weight_decay": 0.0}, 2),
        ("ia3-f09752f9", {"learning_rate": 0.1, "weight_decay": 0.5}, 1),
        ("ia3-bba02459", {"learning_rate": 0.1, "weight_decay": 0.5}, 2),
        ("ia3-ead1e450", {"learning_rate": 0.2, "weight_decay": 0.0}, 1),
        ("ia3-61d6f68d", {"learning_rate": 0.2, "weight_decay": 0.0}, 2),
        ("ia3-8545ccad", {"learning_rate": 0.2, "weight_decay": 0.5}, 1),
        ("ia3-2685df6d", {"learning_rate": 0.2, "weight_decay": 0.5}, 2),
    ]
    assert dict(stage[0].flags) == {
        "model_name_or_path": "m", "train_file": "t.jsonl", "max_train_steps": 9, "use_ia3": True,
        "learning_rate": 0.1, "weight_decay": 0.0, "split_seed": 1, "seed": 1, "num_sample_answers": 0,
        "keep_best": False,
    }  # fmt: skip
    assert all(trial.full_length for trial in stage)
    assert next_trials(study, study.specs[1], {})[0].key == "prompt_tuning-b524239e"
    assert next_trials(study, study.specs[0], losses_of(stage, [1.0] * 8)) == []


def test_random_search_runs_the_best_with_the_other_seeds(tmp_path):
    study = read_study(tmp_path, RANDOM, ["prompt_tuning"])
    spec = only_spec(study)
    first = next_trials(study, spec, {})
    assert [(trial.key, *dict(trial.params).values(), trial.seed) for trial in first] == [
        ("prompt_tuning-41bca2a7", 0.0143, 69, "random", 1),
        ("prompt_tuning-31b24a1e", 0.862, 87, "random", 1),
        ("prompt_tuning-51ef8de2", 0.0533, 2, "random", 1),
        ("prompt_tuning-ccff35c8", 0.277, 6, "random", 1),
    ]
    losses = losses_of(first, [3.0, 1.0, 2.0, 4.0])
    second = next_trials(study, spec, losses)
    assert [(trial.key, trial.params, trial.seed) for trial in second] == [
        ("prompt_tuning-3c5e0039", first[1].params, 2)
    ]
    assert next_trials(study, spec, losses | losses_of(second, [9.0])) == []


def test_random_search_with_one_seed_ends_with_its_first_stage(tmp_path):
    study = read_study(tmp_path, RANDOM, ["prompt_tuning"], seeds=(1,))
    first = next_trials(study, only_spec(study), {})
    assert len(first) == 4 and next_trials(study, only_spec(study), losses_of(first, [1.0, 2.0, 3.0, 4.0])) == []


def test_halving_gives_a_third_of_the_candidates_three_times_the_steps(tmp_path):
    study = read_study(tmp_path, HALVING, ["ia3"])
    spec = only_spec(study)
    first = next_trials(study, spec, {})
    rates = [0.00171, 0.105, 0.0126, 0.00518, 0.00137, 0.167, 0.327, 0.00437, 0.533]
    assert [dict(trial.params)["learning_rate"] for trial in first] == rates
    assert {(num_steps(trial), trial.seed, trial.full_length) for trial in first} == {(1, 1, False)}
    losses = losses_of(first, [0.5, 0.1, 0.9, 0.4, 0.8, 0.2, 0.7, 0.6, 0.3])
    second = next_trials(study, spec, losses)
    assert [(trial.key, dict(trial.params)["learning_rate"], num_steps(trial)) for trial in second] == [
        ("ia3-63b3c208", 0.105, 3),
        ("ia3-31600d50", 0.167, 3),
        ("ia3-c3c82c59", 0.533, 3),
    ]
    losses |= losses_of(second, [0.5, 0.1, 0.9])
    third = next_trials(study, spec, losses)
    assert [(trial.key, trial.seed, num_steps(trial), trial.full_length) for trial in third] == [
        ("ia3-72115961", 1, 9, True),
        ("ia3-5e8f9bcf", 2, 9, True),
    ]
    assert third[0].params == second[1].params
    assert next_trials(study, spec, losses | losses_of(third, [1.0, 1.0])) == []


def run_search(study: Study, losses: dict[str, float], num_trials: int | None = None) -> list[str]:
    """Run a search on invented losses until it is over, or stopped after `num_trials`.

    Returns:
        Keys of the trials that ran, in order; `losses` receives their losses.
    """
    keys: list[str] = []
    while stage := next_trials(study, only_spec(study), losses):
        for trial in stage:
            if trial.key in losses:
                continue
            if len(keys) == num_trials:
                return keys
            losses[trial.key] = (int(trial.key[-4:], 16) * 7919 % 101) / 100
            keys.append(trial.key)
    return keys


@pytest.mark.parametrize("settings", [GRID, RANDOM, HALVING], ids=lambda settings: settings["kind"])
def test_a_search_stopped_anywhere_goes_on_with_the_same_trials(settings, tmp_path):
    study = read_study(tmp_path, settings, ["prompt_tuning"])
    every_key = run_search(study, {})
    assert len(every_key) == len(set(every_key)) == {"grid": 8, "random": 5, "halving": 14}[settings["kind"]]
    for num_trials in range(len(every_key) + 1):
        losses: dict[str, float] = {}
        before = run_search(study, losses, num_trials)
        assert len(before) == num_trials and before + run_search(study, losses) == every_key


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_search_never_prefers_a_loss_that_is_not_finite(bad, tmp_path):
    study = read_study(tmp_path, RANDOM, ["prompt_tuning"])
    first = next_trials(study, only_spec(study), {})
    (best,) = next_trials(study, only_spec(study), losses_of(first, [bad, 2.0, bad, 1.0]))
    assert best.params == first[3].params
    study = read_study(tmp_path, HALVING, ["ia3"])
    first = next_trials(study, only_spec(study), {})
    second = next_trials(study, only_spec(study), losses_of(first, [bad, 3.0, bad, 2.0, bad, 1.0, bad, bad, bad]))
    assert [trial.params for trial in second] == [first[i].params for i in (5, 3, 1)]


def test_points_are_spread_over_the_logarithm_and_depend_on_nothing_else(tmp_path):
    space = {"learning_rate": {"low": 1e-4, "high": 1.0}, "num_virtual_tokens": {"low": 1, "high": 100}}
    settings = {"kind": "random", "points": 200, "space": {}}
    alone = read_study(tmp_path, settings, {"prompt_tuning": {"space": space}})
    methods = {"lora": {"space": {"lora_rank": [4, 8]}}, "prompt_tuning": {"space": space}}
    beside_lora = read_study(tmp_path, settings, methods)
    points = search.candidates(alone, alone.specs[0])
    assert points == search.candidates(beside_lora, beside_lora.specs[1])
    rates = [point["learning_rate"] for point in points]
    assert 0.4 < np.mean([rate < 1e-2 for rate in rates]) < 0.6 and min(rates) >= 1e-4 and max(rates) <= 1
    assert {type(point["num_virtual_tokens"]) for point in points} == {int}
