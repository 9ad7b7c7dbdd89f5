"""What the finished trials of a study say: chosen points, figures with intervals, paired differences, Pareto fronts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True)
class Done:
    """A finished trial."""

    entry: str
    point: dict[str, Any]
    seed: int
    full_length: bool
    command: str
    folder: str
    failed: str | None
    summary: dict[str, Any]
    base: dict[str, Any]  # figures of the base that it started from
    learning_rate: float
    curve: list[tuple[int, float]]  # (step, held-out loss)


def loss(summary: dict[str, Any], part: str) -> float:
    """Nats per labelled token on a part of the held-out rows: "choosing" or "test"."""
    rows = [summary["study"]["rows"][i] for i in summary["study"][part]]
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def other_loss(summary: dict[str, Any]) -> float:
    """Nats per token on text that was not trained for; nan where there is none."""
    rows = summary["study"]["other"]
    return sum(row[0] for row in rows) / sum(row[1] for row in rows) if rows else math.nan


def exact(summary: dict[str, Any]) -> float:
    """Share of right answers; nan where none was asked for."""
    return fmean(summary["study"]["exact"]) if summary["study"]["exact"] else math.nan


def point_name(point: dict[str, Any]) -> str:
    """A point for people."""
    return ", ".join(f"{name} {value}" for name, value in point.items()) or "the recipe"


class Resampling:
    """Draws of test rows and of seeds with replacement, the same for every method: differences are paired by row and by seed."""

    def __init__(self, tokens: np.ndarray) -> None:
        """`tokens`: labelled tokens of each test row."""
        self.tokens = tokens.astype(float)
        self.rows = (
            np.random.default_rng(0xB007)
            .multinomial(len(tokens), [1 / len(tokens)] * len(tokens), RESAMPLES)
            .astype(float)
        )

    def draws(self, losses: np.ndarray) -> np.ndarray:
        """Bootstrapped mean losses from summed losses [seeds, rows]."""
        number = len(losses)
        seeds = np.random.default_rng([0x5EED, number]).multinomial(number, [1 / number] * number, RESAMPLES) / number
        return np.einsum("bs,sr,br->b", seeds, losses, self.rows, optimize=True) / (self.rows @ self.tokens)

    def mean(self, losses: np.ndarray) -> float:
        """The mean loss itself."""
        return float(losses.sum() / len(losses) / self.tokens.sum())


def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
    """The middle share of bootstrapped values."""
    return [float(value) for value in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def analyse(done: Sequence[Done], bases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything that the report says.

    Args:
        done: finished trials, failed ones too.
        bases: figures of the base that each method started from.
    """
    first_base = next(iter(bases.values()))
    test = first_base["study"]["test"]
    tokens = np.array([first_base["study"]["rows"][i][1] for i in test])
    resampling = Resampling(tokens)
    by_entry: dict[str, list[Done]] = defaultdict(list)
    for one in done:
        by_entry[one.entry].append(one)
    losses = {}
    methods = []
    for entry, its in by_entry.items():
        chosen = choose(its)
        if not chosen:
            methods.append({"name": entry, "failed": len(its), "trials": len(its), "works": False})
            continue
        losses[entry] = np.array([[one.summary["study"]["rows"][i][0] for i in test] for one in chosen])
        base = np.array([[bases[entry]["study"]["rows"][i][0] for i in test]])
        methods.append(method_figures(entry, its, chosen, losses[entry], base, resampling, bases[entry]))
    return {
        "base": {"loss": loss(first_base, "test"), "exact": exact(first_base), "other": other_loss(first_base)},
        "test_rows": len(test),
        "choosing_rows": len(first_base["study"]["choosing"]),
        "test_tokens": int(tokens.sum()),
        "questions": len(first_base["study"]["exact"]),
        "other_tokens": sum(row[1] for row in first_base["study"]["other"]),
        "methods": sorted(methods, key=lambda m: m["test"]["value"] if m["works"] else math.inf),
        "pairs": pairs(losses, resampling),
        "quantised": {
            name: (base["quantised"], loss(base, "test")) for name, base in bases.items() if base["quantised"]
        },
        "unequal_tokens": unequal_tokens(done),
        "on_cpu": any(one.summary["study"]["device"] == "cpu" for one in done if not one.failed),
    }


def unequal_tokens(done: Sequence[Done]) -> dict[int, list[int]]:
    """Seeds with which full-length trials have trained on different numbers of tokens, and those numbers: empty in a fair study."""
    tokens: dict[int, set[int]] = defaultdict(set)
    for one in done:
        if one.full_length and not one.failed:
            tokens[one.seed].add(one.summary["tokens"])
    return {seed: sorted(found) for seed, found in tokens.items() if len(found) > 1}


def choose(its: Sequence[Done]) -> list[Done]:
    """The trials of the best point, one a seed: lowest mean loss on the rows for choosing, over the seeds that every point has."""
    by_point: dict[str, list[Done]] = defaultdict(list)
    for one in its:
        if one.full_length:
            by_point[point_name(one.point)].append(one)
    sound = {name: found for name, found in by_point.items() if not any(one.failed for one in found)}
    if not sound:
        return []
    common = set.intersection(*({one.seed for one in found} for found in sound.values()))
    best = min(
        sound.values(),
        key=lambda found: fmean(loss(one.summary, "choosing") for one in found if one.seed in common or not common),
    )
    return sorted(best, key=lambda one: one.seed)


def method_figures(
    entry: str,
    its: Sequence[Done],
    chosen: Sequence[Done],
    losses: np.ndarray,
    base: np.ndarray,
    resampling: Resampling,
    base_summary: Any,
) -> dict[str, Any]:
    """One method at its chosen point."""
    draws, base_draws = resampling.draws(losses), resampling.draws(base)
    value, base_value = resampling.mean(losses), resampling.mean(base)
    first = chosen[0].summary
    return {
        "name": entry,
        "works": True,
        "point": chosen[0].point,
        "learning_rate": chosen[0].learning_rate,
        "seeds": [one.seed for one in chosen],
        "trials": len(its),
        "failed": sum(bool(one.failed) for one in its),
        "searched_tokens": sum(one.summary.get("tokens", 0) for one in its),
        "test": {"value": value, "interval": interval(draws)},
        "less_base": {"value": value - base_value, "interval": interval(draws - base_draws)},
        "by_seed": [loss(one.summary, "test") for one in chosen],
        "exact": fmean(exact(one.summary) for one in chosen),
        "trained": first["trainable_parameters"],
        "total": first["total_parameters"],
        "bytes": first["adapter_bytes"],
        "seconds": fmean(one.summary["wall_seconds"] for one in chosen),
        "memory_mb": fmean(one.summary["peak_memory_mb"] for one in chosen),
        "forgetting": fmean(other_loss(one.summary) for one in chosen) - other_loss(base_summary),
        "curves": [one.curve for one in chosen],
        "rates": rates(its),
        "recipe": recipe_loss(its),
        "commands": [one.command for one in chosen],
    }


def rates(its: Sequence[Done]) -> list[tuple[float, float]]:
    """(learning rate, lowest mean test loss at it) of the full-length trials, over all else that was searched."""
    groups: dict[tuple[float, str], list[float]] = defaultdict(list)
    for one in its:
        if one.full_length and not one.failed:
            rest = {name: value for name, value in one.point.items() if not name.startswith("learning_rate")}
            groups[one.learning_rate, point_name(rest)].append(loss(one.summary, "test"))
    best: dict[float, float] = {}
    for (rate, _), found in groups.items():
        best[rate] = min(best.get(rate, math.inf), fmean(found))
    return sorted(best.items())


def recipe_loss(its: Sequence[Done]) -> float | None:
    """Mean test loss of the point that changes nothing but the rate, and that by a factor of 1; None where it was not run."""
    found = [
        loss(one.summary, "test")
        for one in its
        if one.full_length and not one.failed and one.point in ({}, {"learning_rate_factor": 1})
    ]
    return fmean(found) if found else None


def pairs(losses: dict[str, np.ndarray], resampling: Resampling) -> list[dict[str, Any]]:
    """Differences between methods. The intervals hold together at 95 % (Bonferroni: each at 1 - 5 % / number of pairs)."""
    drawn = {name: resampling.draws(values) for name, values in losses.items()}
    number = math.comb(len(losses), 2)
    found = []
    for one, other in combinations(sorted(losses, key=lambda name: resampling.mean(losses[name])), 2):
        bounds = interval(drawn[one] - drawn[other], 1 - 0.05 / number)
        found.append(
            {
                "better": one,
                "worse": other,
                "value": resampling.mean(losses[one]) - resampling.mean(losses[other]),
                "interval": bounds,
                "clear": bounds[1] < 0,
            }
        )
    return found


def front(methods: Sequence[dict[str, Any]], cost: str, gain: str = "loss") -> list[str]:
    """Methods that no other beats in both cost and result, cheapest first. `gain`: "loss" (low is good) or "exact" (high is good)."""
    worth = {m["name"]: (m[cost], m["test"]["value"] if gain == "loss" else -m["exact"]) for m in methods if m["works"]}
    kept = [
        name
        for name, (c, v) in worth.items()
        if not any((c2 <= c and v2 <= v) and (c2, v2) != (c, v) for other, (c2, v2) in worth.items() if other != name)
    ]
    return sorted(kept, key=lambda name: worth[name])
