"""Which trials a study has: each method's points by grid, random search or successive halving, the same number for each."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_instruct.command_line import config_words
from open_instruct.study.config import Axis, Entry, Study

Losses = dict[str, float]  # of each trial on the rows for choosing; infinite where it failed
Stages = Generator[list["Trial"], Losses, None]


@dataclass(frozen=True)
class Trial:
    """One run of the trainer: a competitor's point of the search, a seed, and the flags that make them."""

    entry: str
    point: tuple[tuple[str, Any], ...]
    seed: int
    flags: tuple[tuple[str, Any], ...]
    full_length: bool = True  # False in the early rounds of halving

    @property
    def key(self) -> str:
        """Name of the trial's folder: the same flags give the same name."""
        digest = hashlib.sha256(json.dumps(self.flags, default=str).encode()).hexdigest()[:8]
        return f"{self.entry}-{digest}"

    @property
    def words(self) -> list[str]:
        """The command line's words."""
        return [word for name, value in self.flags for word in (f"--{name}", *config_words(value))]

    @property
    def label(self) -> str:
        """The point and the seed, for people."""
        return ", ".join([*(f"{name} {value}" for name, value in self.point), f"seed {self.seed}"])


def trial(study: Study, entry: Entry, point: dict[str, Any], seed: int, num_steps: int | None = None) -> Trial:
    """The flags of a point: the study's, then the competitor's, then the point's."""
    flags = {**study.flags, **({} if entry.method == "full" else {f"use_{entry.method}": True}), **entry.flags, **point}
    flags |= {"split_seed": study.flags.get("split_seed", study.seeds[0]), "seed": seed, "num_sample_answers": 0}
    flags["keep_best"] = False  # it would choose by the test rows too
    if num_steps:
        flags["max_train_steps"] = num_steps
    return Trial(
        entry.name,
        tuple(point.items()),
        seed,
        tuple(flags.items()),
        num_steps in (None, study.flags.get("max_train_steps")),
    )


def points(study: Study, entry: Entry) -> list[dict[str, Any]]:
    """The points of one competitor, the same at each call."""
    if study.kind == "grid":
        return [
            dict(zip([axis.name for axis in entry.space], values, strict=True))
            for values in itertools.product(*(axis.values for axis in entry.space))
        ]
    # Drawn from the competitor's name, so that adding another one changes nothing.
    key = int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[:4], "big")
    generator = np.random.default_rng([study.search_seed, key])
    return [{axis.name: drawn(axis, generator) for axis in entry.space} for _ in range(study.points)]


def drawn(axis: Axis, generator: np.random.Generator) -> Any:
    """A listed value, or one from the range: uniform in its logarithm, three digits."""
    if axis.values:
        return axis.values[int(generator.integers(len(axis.values)))]
    value = math.exp(generator.uniform(math.log(axis.low), math.log(axis.high)))
    whole = isinstance(axis.low, int) and isinstance(axis.high, int)
    return min(axis.high, max(axis.low, round(value))) if whole else float(f"{value:.3g}")


def stages(study: Study, entry: Entry) -> Stages:
    """Lists of trials that can run at once; takes their losses before the next.

    Grid: every point with every seed. Random search: every point with the first seed, then the best with the others. Halving (Jamieson
    and Talwalkar 2016): all points for a fraction of the steps with the first seed, the best 1/eta of them for eta times as many, until
    one goes through all steps with every seed. Each trial starts anew, so that its schedule fits its length.
    """
    found = points(study, entry)
    first, *others = study.seeds
    if study.kind == "grid":
        yield [trial(study, entry, point, seed) for point in found for seed in study.seeds]
        return
    if study.kind == "random":
        tried = [trial(study, entry, point, first) for point in found]
        losses = yield tried
        best = min(tried, key=lambda one: losses[one.key])
        yield [trial(study, entry, dict(best.point), seed) for seed in others]
        return
    whole = int(study.flags["max_train_steps"])
    rounds = max(1, math.ceil(math.log(len(found), study.eta) - 1e-9))
    for number in range(rounds):
        num_steps = max(1, whole // study.eta ** (rounds - number))
        tried = [trial(study, entry, point, first, num_steps) for point in found]
        losses = yield tried
        ranked = sorted(tried, key=lambda one: losses[one.key])
        found = [dict(one.point) for one in ranked[: max(1, len(found) // study.eta)]]
    yield [trial(study, entry, found[0], seed) for seed in study.seeds]
