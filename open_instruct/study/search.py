"""Trials of a study by grid, random search or successive halving, with the same budget for each method."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_instruct.command_line import flag_words
from open_instruct.flags import CHOSEN_BY, FIELDS, JOINED
from open_instruct.ranking import finite_or_inf
from open_instruct.study.config import Axis, MethodSpec, Study


@dataclass(frozen=True)
class Trial:
    """A run of the trainer: the parameters that a search chose, a seed, and all flags that follow from them."""

    spec_name: str
    params: tuple[tuple[str, Any], ...]
    seed: int
    flags: tuple[tuple[str, Any], ...]
    full_length: bool = True  # False in the early rounds of halving

    @property
    def key(self) -> str:
        """Return the name of the trial's folder: the same flags give the same name."""
        digest = hashlib.sha256(json.dumps(self.flags, default=str).encode()).hexdigest()[:8]
        return f"{self.spec_name}-{digest}"

    @property
    def words(self) -> list[str]:
        """Return the flags as words of a command line."""
        return [word for name, value in self.flags for word in flag_words(name, value)]

    @property
    def label(self) -> str:
        """Return parameters and seed as readable text."""
        return ", ".join([*(f"{name} {value}" for name, value in self.params), f"seed {self.seed}"])


def next_trials(study: Study, spec: MethodSpec, losses: Mapping[str, float]) -> list[Trial]:
    """Return the trials of a method's next stage: all of them can run at once, some may have finished already.

    Grid: all candidates with every seed. Random search: all candidates with the first seed, then the best with the
    other seeds. Halving (Jamieson and Talwalkar 2016): all candidates for a fraction of the steps with the first seed,
    the best 1 / eta of them for eta times as many steps, until the last one goes through all steps with every seed.
    Each trial starts anew, so that its schedule fits its length.

    Args:
        study: the study.
        spec: the method whose search continues.
        losses: loss on the rows for choosing of each finished trial, by `Trial.key`. A loss that is not finite counts
            as infinite.

    Returns:
        The first stage of which a trial has no loss yet; empty when the search is over.
    """

    def unfinished(stage: list[Trial]) -> bool:
        return any(trial.key not in losses for trial in stage)

    def choosing_loss(trial: Trial) -> float:
        return finite_or_inf(losses[trial.key])

    all_params = candidates(study, spec)
    first_seed, *other_seeds = study.seeds
    if study.search_kind == "grid":
        stage = [make_trial(study, spec, params, seed) for params in all_params for seed in study.seeds]
    elif study.search_kind == "random":
        stage = [make_trial(study, spec, params, first_seed) for params in all_params]
        if unfinished(stage):
            return stage
        best = min(stage, key=choosing_loss)
        stage = [make_trial(study, spec, dict(best.params), seed) for seed in other_seeds]
    else:
        max_steps = int(study.flags["max_train_steps"])
        num_rounds = max(1, math.ceil(math.log(len(all_params), study.eta) - 1e-9))  # log(125, 5) is 3 + 4e-16
        for rounds_left in range(num_rounds, 0, -1):
            num_steps = max(1, max_steps // study.eta**rounds_left)
            stage = [make_trial(study, spec, params, first_seed, num_steps) for params in all_params]
            if unfinished(stage):
                return stage
            ranked = sorted(stage, key=choosing_loss)
            all_params = [dict(trial.params) for trial in ranked[: max(1, len(all_params) // study.eta)]]
        stage = [make_trial(study, spec, all_params[0], seed) for seed in study.seeds]
    return stage if unfinished(stage) else []


def candidates(study: Study, spec: MethodSpec) -> list[dict[str, Any]]:
    """Return the parameters that a method's search begins with, the same at each call."""
    if study.search_kind == "grid":
        return [
            dict(zip([axis.name for axis in spec.space], values, strict=True))
            for values in itertools.product(*(axis.values for axis in spec.space))
        ]
    # The seed depends on the method's name, so that adding another method changes nothing for this one.
    name_seed = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "big")
    generator = np.random.default_rng([study.search_seed, name_seed])
    return [{axis.name: sample_axis(axis, generator) for axis in spec.space} for _ in range(study.num_candidates)]


def sample_axis(axis: Axis, generator: np.random.Generator) -> Any:
    """Return a listed value, or one of the range: uniform in its logarithm, rounded to three digits or an integer."""
    if axis.values:
        return axis.values[int(generator.integers(len(axis.values)))]
    value = math.exp(generator.uniform(math.log(axis.low), math.log(axis.high)))
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return min(axis.high, max(axis.low, round(value)))
    return float(f"{value:.3g}")


def make_trial(
    study: Study, spec: MethodSpec, params: dict[str, Any], seed: int, num_steps: int | None = None
) -> Trial:
    """Return the trial of some parameters. Its flags are the study's, replaced by the method's, then by `params`.

    Args:
        study: the study.
        spec: the method.
        params: values of the searched flags.
        seed: the run's seed. Which rows are held out depends on the study's first seed alone.
        num_steps: steps of a shortened run; None: as the study says.
    """
    choosing = [CHOSEN_BY[name] for name in JOINED.get(spec.method, (spec.method,)) if name in CHOSEN_BY]
    # A flag with a value is among the method's own.
    method_flags = {name: True for name in choosing if FIELDS[name].default is False}
    flags = {**study.flags, **method_flags, **spec.flags, **params}
    flags |= {"split_seed": study.flags.get("split_seed", study.seeds[0]), "seed": seed, "num_sample_answers": 0}
    flags["keep_best"] = False  # it would choose by the test rows too
    if num_steps:
        flags["max_train_steps"] = num_steps
    full_length = num_steps in (None, study.flags.get("max_train_steps"))
    return Trial(spec.name, tuple(params.items()), seed, tuple(flags.items()), full_length)
