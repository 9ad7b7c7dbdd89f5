"""Examples → optimizer steps → micro-batches of each process.

The plan is a function of the seed and the step number: there is nothing to save, and a resumed run continues with the
examples that the uninterrupted one would have seen.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from open_instruct.data.sources import Mixture, mixed_order


@dataclass(frozen=True)
class Plan:
    """The examples of each step.

    Args:
        num_examples: examples of an epoch: the size of the data set, or of what a mixture takes of it.
        examples_per_step: the global batch: micro-batch size × processes × accumulation steps.
        num_steps: length of the run.
        seed: decides the order of the examples, which is another one in each epoch.
        mixture: what an epoch takes of each source; None: every example once.
    """

    num_examples: int
    examples_per_step: int
    num_steps: int
    seed: int
    mixture: Mixture | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of a full epoch; the last of them may hold fewer examples."""
        return math.ceil(self.num_examples / self.examples_per_step)

    def epoch(self, step: int) -> float:
        """Return the epochs completed after `step` steps, as a fraction."""
        num_completed, step_in_epoch = divmod(step, self.steps_per_epoch)
        return round(num_completed + min(1.0, step_in_epoch * self.examples_per_step / self.num_examples), 6)

    def examples(self, step: int) -> np.ndarray:
        """Return the indices of the examples of step `step` (counted from 0), in shuffled order."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.examples_per_step
        order = mixed_order(self.mixture, epoch) if self.mixture else epoch_order(self.num_examples, self.seed, epoch)
        return order[first : first + self.examples_per_step]

    def mean(self, values: np.ndarray) -> float:
        """Return the mean of values of all examples of the data set over those of an epoch."""
        return self.mixture.mean(values) if self.mixture else float(values.mean())


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the indices of all examples in the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def micro_batches(
    examples: Sequence[int], lengths: Sequence[int] | np.ndarray, size: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """Cut a step's examples into the padded micro-batches of one process.

    Examples of similar length stand together, so that little is padded. Every process gets the same number of
    micro-batches (an empty list where it has nothing left), because all take part in every collective.

    Args:
        examples: indices of the step's examples.
        lengths: tokens of every example of the data set.
        size: examples of a micro-batch at most.
        rank: this process, counted from 0.
        num_ranks: number of processes.

    Returns:
        Indices of the examples of each micro-batch.
    """
    by_length = sorted(examples, key=lambda i: (-lengths[i], i))
    batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
    num_rounds = math.ceil(len(batches) / num_ranks)
    batches += [[] for _ in range(num_rounds * num_ranks - len(batches))]
    return batches[rank::num_ranks]


def balanced_rows(
    examples: Sequence[int], lengths: Sequence[int] | np.ndarray, max_tokens: int, rank: int, num_ranks: int
) -> list[list[int]]:
    """Cut a step's examples into the packed rows of one process.

    There are about as few rows as `max_tokens` allows, and they are of about equal length. Every process gets the same
    number of rows (an empty list where it has nothing left), and the processes' rows of one round are of similar
    length, because in each round all wait for the slowest.

    Each example, longest first, goes to the row that is shortest so far. (This is the rule "longest processing time
    first" of Graham, Bounds on multiprocessing timing anomalies, 1969: the longest row is at most 4/3 of the best
    possible.) If an example does not even fit into the shortest row, each process gets a row more, and all starts
    again.

    Args:
        examples: indices of the step's examples.
        lengths: tokens of every example of the data set; none above `max_tokens`.
        max_tokens: tokens of a row at most.
        rank: this process, counted from 0.
        num_ranks: number of processes.

    Returns:
        Indices of the examples of each row.
    """
    # Ties are broken by the index, so that all processes find the same rows without exchanging a word.
    by_length = sorted(examples, key=lambda i: (-lengths[i], i))
    # The fewest rows into which the tokens could be cut if examples could, as a multiple of the processes.
    num_rows = max(1, math.ceil(sum(int(lengths[i]) for i in examples) / (max_tokens * num_ranks))) * num_ranks
    # Ends, because with a row for each example all of them fit.
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        heap = [(0, row) for row in range(num_rows)]  # (tokens so far, row), the shortest row first
        for index in by_length:
            num_tokens, row = heap[0]
            if num_tokens + int(lengths[index]) > max_tokens:
                break  # it fits into no row, as this one is the shortest
            rows[row].append(index)
            heapq.heapreplace(heap, (num_tokens + int(lengths[index]), row))
        else:
            # Longest first, and dealt out in turn: a round's rows are neighbours in length, and empty rows come last.
            longest_first = [row for _, row in sorted(heap, reverse=True)]
            return [rows[row] for row in longest_first][rank::num_ranks]
        num_rows += num_ranks
