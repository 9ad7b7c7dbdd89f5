"""Examples → optimizer steps → micro-batches of each process.

The plan is a function of the seed and the step number: there is nothing to save, and a resumed run goes on with the
examples that the uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Which examples each step holds.

    Args:
        num_examples: examples of the data set.
        examples_per_step: the global batch: micro-batch size × processes × accumulation steps.
        num_steps: steps of the run.
        seed: of the order; each epoch has its own.
    """

    num_examples: int
    examples_per_step: int
    num_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a full epoch; the last of them may hold fewer examples."""
        return math.ceil(self.num_examples / self.examples_per_step)

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` steps, as a fraction."""
        whole, within = divmod(step, self.steps_per_epoch)
        return round(whole + min(1.0, within * self.examples_per_step / self.num_examples), 6)

    def examples(self, step: int) -> np.ndarray:
        """Indices of the examples of step `step` (counted from 0), in shuffled order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return order(self.num_examples, self.seed, epoch)[within * self.examples_per_step : (within + 1) * self.examples_per_step]


@lru_cache(maxsize=2)
def order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def micro_batches(examples: Sequence[int], lengths: Sequence[int] | np.ndarray, size: int, rank: int, num_ranks: int) -> list[list[int]]:
    """Cut a step's examples into the micro-batches of one process.

    Examples of similar length stand together, so that little is padded. Every process gets the same number of
    micro-batches (an empty list where it has nothing left), because all take part in every collective.
    """
    by_length = sorted(examples, key=lambda i: (-lengths[i], i))
    cut = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    rounds = math.ceil(len(cut) / num_ranks)
    cut += [[] for _ in range(rounds * num_ranks - len(cut))]
    return cut[rank::num_ranks]
