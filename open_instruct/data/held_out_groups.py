"""Held-out rows of which several conversations are made, or that may stand before others as exemplars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from open_instruct.data.dataset import Examples
from open_instruct.errors import InputError


def hold_out_groups(
    examples: Examples, fraction: float, max_held_out: int, seed: int, exemplars: Sequence[int]
) -> tuple[Examples, Examples | None]:
    """Split off `fraction` of the examples, as `hold_out`, with those of one row on one side.

    Args:
        examples: the examples.
        fraction: share of them, about.
        max_held_out: most of them, about.
        seed: decides which.
        exemplars: exact hashes of rows that are never held out, as they stand before others.

    Raises:
        InputError: no row is left to hold out, or to train on.
    """
    if fraction == 0:
        return examples, None
    rows, group = np.unique(examples.hashes[0], return_inverse=True)
    free = np.flatnonzero(~np.isin(rows, np.asarray(exemplars, np.int64)))
    order = np.random.default_rng([seed, 0x5EED]).permutation(free)
    wanted = max(1, min(max_held_out, round(fraction * len(examples))))
    taken = np.searchsorted(np.cumsum(np.bincount(group, minlength=len(rows))[order]), wanted) + 1
    is_held_out = np.isin(group, order[:taken])
    if not is_held_out.any() or is_held_out.all():
        raise InputError(
            f"too few of the {len(rows)} different rows can be held out, as the {len(exemplars)} exemplars can't: give "
            "more rows, a --validation_file, or --validation_fraction 0"
        )
    return examples.subset(np.flatnonzero(~is_held_out)), examples.subset(np.flatnonzero(is_held_out))
