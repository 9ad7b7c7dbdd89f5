"""Figures of a study: chosen parameters, losses with intervals, paired differences between methods, Pareto fronts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from open_instruct.bootstrap import Resampling, interval
from open_instruct.errors import InputError
from open_instruct.ranking import finite_or_inf
from open_instruct.study.answers import AnswerFigure, StudyScores, answer_figures, exact_match
from open_instruct.study.results import (
    StudyResults,
    TrialResult,
    other_loss,
    params_name,
    split_loss,
)

# Names in report.json where they differ from the fields': files of older studies have them too.
JSON_NAMES = {
    "params": "point",
    "num_trials": "trials",
    "num_failed": "failed",
    "num_searched_tokens": "searched_tokens",
    "num_trained_parameters": "trained",
    "num_parameters": "total",
    "num_bytes": "bytes",
    "num_test_rows": "test_rows",
    "num_choosing_rows": "choosing_rows",
    "num_test_tokens": "test_tokens",
    "num_questions": "questions",
    "num_other_tokens": "other_tokens",
}


@dataclass(frozen=True)
class Estimate:
    """A figure and the bounds of its interval."""

    value: float
    interval: list[float]


@dataclass(frozen=True)
class BaseFigures:
    """The base model: test loss, share of right answers, and loss on other text (nan where not measured)."""

    loss: float
    exact: float
    other: float


@dataclass(frozen=True)
class FailedMethod:
    """A method of which no candidate has a finite loss in all of its trials."""

    name: str
    num_failed: int
    num_trials: int

    def as_json(self) -> dict[str, Any]:
        """Return the method's part of report.json."""
        return {**json_fields(self), "works": False}


@dataclass(frozen=True)
class MethodFigures:
    """A method with its chosen parameters. Losses are in nats per token; means are over seeds."""

    name: str
    params: dict[str, Any]
    learning_rate: float
    seeds: list[int]
    num_trials: int
    num_failed: int
    num_searched_tokens: int  # trained on by all trials
    test: Estimate  # test loss
    less_base: Estimate  # test loss less the base model's
    by_seed: list[float]  # test losses
    exact: float
    num_trained_parameters: int
    num_parameters: int
    num_bytes: int  # of the adapter's files
    seconds: float
    memory_mb: float
    forgetting: float  # change of the loss on other text
    forgetting_interval: list[float] | None  # None: not measured
    curves: list[list[tuple[int, float]]]  # (step, held-out loss), of each seed
    rates: list[tuple[float, float]]  # (learning rate, lowest mean test loss at it)
    recipe: float | None  # test loss with the recipe's parameters, where they were tried
    commands: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the method's part of report.json."""
        return {**json_fields(self), "works": True}


@dataclass(frozen=True)
class PairDifference:
    """The difference between the test losses of two methods, the lower one less the higher one."""

    better: str
    worse: str
    value: float
    interval: list[float]
    clear: bool  # larger than chance would explain


@dataclass(frozen=True)
class StudyFigures:
    """All figures of a report."""

    base: BaseFigures
    num_test_rows: int
    num_choosing_rows: int
    num_test_tokens: int
    num_questions: int
    num_other_tokens: int
    methods: list[MethodFigures]  # lowest test loss first
    failed_methods: list[FailedMethod]
    pairs: list[PairDifference]
    answers: list[AnswerFigure]  # figures of the answers to test questions; empty: none were asked
    quantised: dict[str, tuple[str, float]]  # method → how its base is quantised, and that base's test loss
    unequal_tokens: dict[int, list[int]]  # see `find_unequal_tokens`
    on_cpu: bool

    def as_json(self) -> dict[str, Any]:
        """Return the figures as report.json holds them: the failed methods stand behind the others."""
        content = json_fields(self)
        del content["failed_methods"]
        works, failed = ([method.as_json() for method in group] for group in (self.methods, self.failed_methods))
        return {**content, "methods": works + failed}


@dataclass(frozen=True)
class Cost:
    """Costs of a method."""

    name: str
    unit: str
    of: Callable[[MethodFigures], float]

    @property
    def label(self) -> str:
        """Return name and unit for an axis."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


COSTS = (
    Cost("trained parameters", "", lambda method: method.num_trained_parameters),
    Cost("training time", "s", lambda method: method.seconds),
    Cost("peak memory", "MB", lambda method: method.memory_mb),
    Cost("size on disk", "bytes", lambda method: method.num_bytes),
)


def json_fields(figures: Any) -> dict[str, Any]:
    """Return a dataclass's fields under their names in report.json."""
    return {JSON_NAMES.get(name, name): value for name, value in asdict(figures).items()}


def analyse(results: StudyResults, scores: StudyScores) -> StudyFigures:
    """Compute all figures of a study from its finished trials.

    Args:
        results: the trials.
        scores: of their answers.

    Raises:
        InputError: there is no method whose parameters could be chosen.
    """
    bases = results.bases
    first_base = next(iter(bases.values()))
    test_rows = first_base["study"]["test"]
    num_tokens = np.array([first_base["study"]["rows"][i][1] for i in test_rows])
    resampling = Resampling(num_tokens)
    by_method: dict[str, list[TrialResult]] = defaultdict(list)
    for result in results.trials:
        by_method[result.spec_name].append(result)
    chosen_trials: dict[str, list[TrialResult]] = {}
    losses: dict[str, np.ndarray] = {}  # summed over each row: [seeds, test rows]
    methods, failed_methods = [], []
    for name, trials in by_method.items():
        chosen = choose_params(trials)
        if not chosen:
            failed_methods.append(FailedMethod(name, len(trials), len(trials)))
            continue
        losses[name] = np.array([[result.summary["study"]["rows"][i][0] for i in test_rows] for result in chosen])
        chosen_trials[name] = chosen
        exact = fmean(exact_match(scores.trials[result.folder]) for result in chosen)
        methods.append(method_figures(trials, chosen, losses[name], bases[name], resampling, exact))
    if not methods:
        raise InputError(
            "the study has no method yet of which every seed at full length ended with a finite loss: "
            "see trials/*/failed.json and log.txt, or run the rest first"
        )
    return StudyFigures(
        base=BaseFigures(
            split_loss(first_base, "test"), exact_match(scores.bases[next(iter(bases))]), other_loss(first_base)
        ),
        num_test_rows=len(test_rows),
        num_choosing_rows=len(first_base["study"]["choosing"]),
        num_test_tokens=int(num_tokens.sum()),
        num_questions=len(first_base["study"]["exact"]),
        num_other_tokens=sum(row[1] for row in first_base["study"]["other"]),
        methods=sorted(methods, key=lambda method: finite_or_inf(method.test.value)),
        failed_methods=failed_methods,
        pairs=pair_differences(losses, resampling),
        answers=answer_figures(chosen_trials, scores),
        quantised={
            name: (base["quantised"], split_loss(base, "test")) for name, base in bases.items() if base["quantised"]
        },
        unequal_tokens=find_unequal_tokens(results.trials),
        on_cpu=any(result.summary["study"]["device"] == "cpu" for result in results.trials if not result.failed),
    )


def find_unequal_tokens(trials: Sequence[TrialResult]) -> dict[int, list[int]]:
    """Return the seeds with which full-length trials trained on different numbers of tokens, and those numbers.

    Empty in a fair study.
    """
    by_seed: dict[int, set[int]] = defaultdict(set)
    for result in trials:
        if result.full_length and not result.failed:
            by_seed[result.seed].add(result.summary["tokens"])
    return {seed: sorted(num_tokens) for seed, num_tokens in by_seed.items() if len(num_tokens) > 1}


def choose_params(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Return a method's trials with the best parameters, one for each seed.

    The best have the lowest mean loss on the rows for choosing, over the seeds that all parameters were run with.
    Parameters of which a trial failed, or has a choosing loss that is not finite, are never the best.

    Args:
        trials: all finished trials of the method.

    Returns:
        The chosen trials, by seed; empty if no parameters are left.
    """
    by_params: dict[str, list[TrialResult]] = defaultdict(list)
    for result in trials:
        if result.full_length:
            by_params[params_name(result.params)].append(result)
    sound = [group for group in by_params.values() if all(math.isfinite(result.choosing_loss) for result in group)]
    if not sound:
        return []
    common_seeds = set.intersection(*({result.seed for result in group} for group in sound))

    best = min(
        sound,
        key=lambda group: fmean(
            result.choosing_loss for result in group if result.seed in common_seeds or not common_seeds
        ),
    )
    return sorted(best, key=lambda result: result.seed)


def method_figures(
    trials: Sequence[TrialResult],
    chosen: Sequence[TrialResult],
    losses: np.ndarray,
    base: dict[str, Any],
    resampling: Resampling,
    exact: float,
) -> MethodFigures:
    """Compute the figures of one method.

    Args:
        trials: all of its finished trials.
        chosen: those with the chosen parameters, one for each seed.
        losses: summed losses of the chosen trials, [seeds, test rows].
        base: figures of the base model that the method started from.
        resampling: the draws of rows and seeds that all methods share.
        exact: share of questions that the chosen trials answered right.
    """
    base_losses = np.array([[base["study"]["rows"][i][0] for i in base["study"]["test"]]])  # [1, test rows]
    draws, base_draws = resampling.draws(losses), resampling.draws(base_losses)
    test_loss, base_loss = resampling.mean(losses), resampling.mean(base_losses)
    first = chosen[0].summary
    return MethodFigures(
        name=chosen[0].spec_name,
        params=chosen[0].params,
        learning_rate=chosen[0].learning_rate,
        seeds=[result.seed for result in chosen],
        num_trials=len(trials),
        num_failed=sum(bool(result.failed) for result in trials),
        num_searched_tokens=sum(result.summary.get("tokens", 0) for result in trials),
        test=Estimate(test_loss, interval(draws)),
        less_base=Estimate(test_loss - base_loss, interval(draws - base_draws)),
        by_seed=[result.test_loss for result in chosen],
        exact=exact,
        num_trained_parameters=first["trainable_parameters"],
        num_parameters=first["total_parameters"],
        num_bytes=first["adapter_bytes"],
        seconds=fmean(result.summary["wall_seconds"] for result in chosen),
        memory_mb=fmean(result.summary["peak_memory_mb"] for result in chosen),
        forgetting=fmean(other_loss(result.summary) for result in chosen) - other_loss(base),
        forgetting_interval=forgetting_interval(chosen, base),
        curves=[result.curve for result in chosen],
        rates=loss_by_rate(trials),
        recipe=recipe_loss(trials),
        commands=[result.command for result in chosen],
    )


def forgetting_interval(chosen: Sequence[TrialResult], base: dict[str, Any]) -> list[float] | None:
    """Return the interval of the change of the loss on other text, over its rows and over seeds; None without it.

    Args:
        chosen: the trials with the chosen parameters, one for each seed.
        base: figures of the base model.
    """
    base_rows = np.array(base["study"]["other"], dtype=float)
    if not len(base_rows):
        return None
    counted = base_rows[:, 1] > 0
    resampling = Resampling(base_rows[counted, 1])
    losses = np.array([[row[0] for row in result.summary["study"]["other"]] for result in chosen], dtype=float)
    return interval(resampling.draws(losses[:, counted]) - resampling.draws(base_rows[counted, 0][None]))


def loss_by_rate(trials: Sequence[TrialResult]) -> list[tuple[float, float]]:
    """Return (learning rate, lowest mean test loss at it over all else that was searched) of the full-length trials.

    A mean that is not finite is left out, as failed trials are.
    """
    groups: dict[tuple[float, str], list[float]] = defaultdict(list)
    for result in trials:
        if result.full_length and not result.failed:
            rest = {name: value for name, value in result.params.items() if not name.startswith("learning_rate")}
            groups[result.learning_rate, params_name(rest)].append(result.test_loss)
    lowest: dict[float, float] = {}
    for (rate, _), losses in groups.items():
        lowest[rate] = min(lowest.get(rate, math.inf), finite_or_inf(fmean(losses)))
    return sorted((rate, loss) for rate, loss in lowest.items() if math.isfinite(loss))


def recipe_loss(trials: Sequence[TrialResult]) -> float | None:
    """Return the mean test loss with the recipe's parameters; None where they were not run."""
    losses = [
        result.test_loss
        for result in trials
        if result.full_length and not result.failed and result.params in ({}, {"learning_rate_factor": 1})
    ]
    return fmean(losses) if losses else None


def pair_differences(losses: dict[str, np.ndarray], resampling: Resampling) -> list[PairDifference]:
    """Return the differences between all pairs of methods, the lower loss first.

    The intervals hold together at 95 % (Bonferroni): each of n holds at 1 - 5 % / n.

    Args:
        losses: summed losses of each method's chosen trials, [seeds, test rows].
        resampling: the draws of rows and seeds that all methods share.
    """
    draws = {name: resampling.draws(values) for name, values in losses.items()}
    means = {name: resampling.mean(values) for name, values in losses.items()}
    by_loss = sorted(losses, key=lambda name: finite_or_inf(means[name]))
    level = 1 - 0.05 / max(1, math.comb(len(losses), 2))
    pairs = []
    for better, worse in combinations(by_loss, 2):
        bounds = interval(draws[better] - draws[worse], level)
        pairs.append(PairDifference(better, worse, means[better] - means[worse], bounds, bounds[1] < 0))
    return pairs


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points that no other point beats in both coordinates, in the order of the first.

    Args:
        points: (cost, result) by name; low is good in both. What is not finite counts as infinite.
    """
    finite = {name: (finite_or_inf(cost), finite_or_inf(result)) for name, (cost, result) in points.items()}

    def beaten(name: str) -> bool:
        cost, result = finite[name]
        return any(
            (other_cost <= cost and other_result <= result) and (other_cost, other_result) != (cost, result)
            for other_cost, other_result in finite.values()
        )

    return sorted((name for name in finite if not beaten(name)), key=finite.__getitem__)
