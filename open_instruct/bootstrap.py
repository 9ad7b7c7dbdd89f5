"""Bootstrap intervals: rows and seeds drawn with replacement, the same draws for everything that is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NUM_DRAWS = 4000


class Resampling:
    """Paired two-way bootstrap of a mean loss per token, over test rows and over seeds.

    With l[s, r] the summed loss of row r in the run with seed s, and t[r] the row's labelled tokens, a method's loss is

        L = (1 / S) sum_s sum_r l[s, r] / sum_r t[r].

    Draw b takes S seeds and R rows with replacement, independently of each other. With m[b, s] and n[b, r] how often
    it takes each,

        L[b] = sum_s sum_r (m[b, s] / S) l[s, r] n[b, r] / sum_r n[b, r] t[r],
        m[b] ~ Multinomial(S, 1 / S),  n[b] ~ Multinomial(R, 1 / R).

    The generators are seeded by constants, so every method meets the same n and, with equally many seeds, the same m.
    The difference L1[b] - L2[b] of two methods is therefore paired by row and by seed: what makes a row hard for both
    cancels out. Rows are drawn as a whole, because tokens of a row are not independent.

    S seeds · R test rows · B = NUM_DRAWS draws.
    """

    def __init__(self, num_tokens: np.ndarray) -> None:
        """Draw the rows; `num_tokens`: [R], labelled tokens of each test row."""
        self.num_tokens = num_tokens.astype(float)
        num_rows = len(num_tokens)
        counts_BR = np.random.default_rng(0xB007).multinomial(num_rows, [1 / num_rows] * num_rows, NUM_DRAWS)
        self.row_counts = counts_BR.astype(float)  # a product of floats is BLAS's, one of integers is not

    def draws(self, losses: np.ndarray) -> np.ndarray:
        """Return the bootstrapped mean losses [B] of summed losses [S, R], in nats per labelled token."""
        summed = np.einsum("bs,sr,br->b", seed_shares(len(losses)), losses, self.row_counts, optimize=True)
        return summed / (self.row_counts @ self.num_tokens)

    def draws_of_statistics(self, statistics: Sequence[Callable[[np.ndarray], float]]) -> np.ndarray:
        """Return the bootstrapped means over seeds [B] of a figure that is no mean over rows, as BLEU is none.

        Args:
            statistics: for each seed, a function of the indices of rows, which repeat as often as they are drawn.
        """
        rows = np.arange(len(self.num_tokens))
        drawn = [np.repeat(rows, counts) for counts in self.row_counts.astype(int)]
        values_BS = np.array([[statistic(indices) for statistic in statistics] for indices in drawn])
        means: np.ndarray = (seed_shares(len(statistics)) * values_BS).sum(1)
        return means

    def mean(self, losses: np.ndarray) -> float:
        """Return the mean loss itself, of summed losses [S, R], in nats per labelled token."""
        return float(losses.sum() / len(losses) / self.num_tokens.sum())


def seed_shares(num_seeds: int) -> np.ndarray:
    """Return the share of each seed in each draw, m[b, s] / S, as [B, S]."""
    generator = np.random.default_rng([0x5EED, num_seeds])
    shares: np.ndarray = generator.multinomial(num_seeds, [1 / num_seeds] * num_seeds, NUM_DRAWS) / num_seeds
    return shares


def interval(draws: np.ndarray | Sequence[float], level: float = 0.95) -> list[float]:
    """Return the bounds of the middle share `level` of bootstrapped values: the percentile interval (Efron 1979)."""
    return [float(bound) for bound in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])]
