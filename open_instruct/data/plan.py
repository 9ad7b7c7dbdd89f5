"""Examples → optimizer steps → micro-batches of each process.

The plan is a function of the seed and the step number: there is nothing to save, and a resumed run goes on with the
examples that the uninterrupted one would have seen.
"""

from __future__ import annotations

import heapq
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
        return order(self.num_examples, self.seed, epoch)[
            within * self.examples_per_step : (within + 1) * self.examples_per_step
        ]


@lru_cache(maxsize=2)
def order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's examples."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def micro_batches(
    examples: Sequence[int], lengths: Sequence[int] | np.ndarray, size: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """Cut a step's examples into the micro-batches of one process.

    Examples of similar length stand together, so that little is padded. Every process gets the same number of
    micro-batches (an empty list where it has nothing left), because all take part in every collective.
    """
    by_length = sorted(examples, key=lambda i: (-lengths[i], i))
    cut = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    rounds = math.ceil(len(cut) / num_ranks)
    cut += [[] for _ in range(rounds * num_ranks - len(cut))]
    return cut[rank::num_ranks]


def balanced_rows(
    examples: Sequence[int], lengths: Sequence[int] | np.ndarray, max_tokens: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """Cut a step's examples into the packed rows of one process.

    As few rows as `max_tokens` allows, a multiple of the processes, of about equal length: each example, longest first,
    goes to the shortest row. Every process gets the same number of rows (an empty list where it has nothing left), and
    the processes' rows of one round are of similar length.

    Args:
        examples: indices of the step's examples.
        lengths: tokens of every example of the data set; none above `max_tokens`.
        max_tokens: tokens of a row at most.
        rank: of the process.
        num_ranks: processes.
    """
    by_length = sorted(examples, key=lambda i: (-lengths[i], i))
    num_rows = max(1, math.ceil(sum(int(lengths[i]) for i in examples) / (max_tokens * num_ranks))) * num_ranks
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        heap = [(0, row) for row in range(num_rows)]
        for index in by_length:
            tokens, row = heap[0]
            if tokens + int(lengths[index]) > max_tokens:
                break
            rows[row].append(index)
            heapq.heapreplace(heap, (tokens + int(lengths[index]), row))
        else:
            order_of_rows = [row for _, row in sorted(heap, reverse=True)]
            return [rows[row] for row in order_of_rows][rank::num_ranks]
        num_rows += num_ranks
