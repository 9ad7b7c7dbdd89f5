"""Splits of a file by a hash of each conversation: a row never changes sides, whatever rows are added or removed.

The hash is that of the conversation without case, white space and punctuation, so equal conversations are always on
one side. It knows nothing of a row's source: each source's shares are kept as well as chance does, to about
√(n · p · (1 - p)) of its n rows. Exact shares would move rows to the other side whenever some are added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from open_instruct.data import forms
from open_instruct.data.duplicates import conversation_text, hash_of, normalised
from open_instruct.errors import InputError, visible

SHARE = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_-]{0,39})=(?P<share>0?\.[0-9]{1,9})")


def parse_shares(words: Sequence[str]) -> dict[str, Fraction]:
    """Return the shares of `train=0.8 validation=0.1 test=0.1`, by name.

    Raises:
        InputError: a word is malformed, a name stands there twice, or the shares don't sum to 1.
    """
    shares: dict[str, Fraction] = {}
    for word in words:
        match = SHARE.fullmatch(word)
        if not match or not Fraction(match["share"]):
            raise InputError(
                f"--splits {visible(word)[:80]}: give names with shares between 0 and 1, as "
                "train=0.8 validation=0.1 test=0.1"
            )
        if match["name"].lower() in map(str.lower, shares):
            raise InputError(f"--splits names {match['name']} twice: give each split once")
        shares[match["name"]] = Fraction(match["share"])
    total = sum(shares.values())
    if total != 1:
        raise InputError(f"--splits: the shares sum to {float(total):.9g}, not 1: give shares of all rows")
    return shares


def draw_splits(
    rows: Iterable[tuple[str, dict[str, Any]]], shares: dict[str, Fraction], seed: int
) -> dict[str, np.ndarray]:
    """Return the numbers of each split's rows, ascending.

    With the hash read as a number h in [0, 1), a row belongs to the first split whose cumulative share exceeds h.

    Args:
        rows: (source, row) of a file, in its order.
        shares: share of each split, by its name; they sum to 1.
        seed: another one gives other splits.

    Raises:
        InputError: a row is no conversation, or a split gets no row.
    """
    conversations = (forms.to_messages(source, row, answered=False) for source, row in rows)
    hashes = [hash_of(normalised(conversation_text(messages)), seed) for messages in conversations]
    bounds = np.cumsum([share * 2**64 for share in shares.values()])[:-1]  # exact: of fractions
    ends = np.array([int(bound) for bound in bounds], np.uint64)
    sides = np.searchsorted(ends, np.array(hashes, np.int64).view(np.uint64), side="right")
    splits = {name: np.flatnonzero(sides == number) for number, name in enumerate(shares)}
    for name, chosen in splits.items():
        if not len(chosen):
            raise InputError(
                f"--splits: {name}={float(shares[name]):g} gets none of the {len(hashes):,} rows: give it a larger "
                "share, or more rows"
            )
    return splits
