"""Sources of the rows, as their column `source` names them, and how much of each an epoch takes.

Temperature (Raffel et al. 2020, section 3.5.2): of sources with n_s rows, source s has the share n_s^(1/T) / Σ n^(1/T).
T = 1 is the shares that the sources have; the larger T, the more equal they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, SupportsIndex, overload

import numpy as np

from open_instruct.data.texts import plain
from open_instruct.data.tools import Tools
from open_instruct.errors import InputError

SOURCE = "source"  # column of rows, and of tokenised data
NO_SOURCE = "(none)"  # stands for the source of rows that name none
MAX_MEASURED = 30  # sources whose losses are measured one by one: each needs micro-batches of its own


class Conversation(list[dict[str, Any]]):
    """The messages of a row, with what else the row says of them. A slice keeps it.

    Attributes:
        source: that the row names; "" where it names none.
        tools: schemas of the tools that the row offers, for the chat template.
    """

    def __init__(self, messages: Iterable[dict[str, Any]], source: str = "", tools: Tools = ()) -> None:
        """Take a row's messages."""
        super().__init__(messages)
        self.source = source
        self.tools = tools

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Conversation: ...

    def __getitem__(self, index: SupportsIndex | slice) -> dict[str, Any] | Conversation:
        """Return a message, or some of them as a conversation."""
        if isinstance(index, slice):
            return Conversation(super().__getitem__(index), self.source, self.tools)
        return super().__getitem__(index)


def with_messages(conversation: Sequence[dict[str, Any]], messages: Iterable[dict[str, Any]]) -> Conversation:
    """Return a conversation with other messages; its source and its tools stay."""
    return Conversation(messages, getattr(conversation, "source", ""), tools_of(conversation))


def tools_of(messages: Sequence[dict[str, Any]]) -> Tools:
    """Return the schemas of the tools that a conversation offers; a plain list of messages offers none."""
    tools: Tools = getattr(messages, "tools", ())
    return tools


def source_in(row: Mapping[str, Any]) -> str:
    """Return the source that a row names; "" where the column is missing, empty or no text."""
    value = row.get(SOURCE)
    return value.strip().encode(errors="replace").decode() if isinstance(value, str) else ""


@dataclass(frozen=True, eq=False)
class Mixture:
    """How often the rows of each source stand in an epoch.

    Over several epochs, the rows of one source are taken equally often, but for one time.

    Args:
        rows: indices of each source's examples, by name.
        counts: examples of each source in an epoch.
        seed: decides which rows are taken, and their order.
    """

    rows: Mapping[str, np.ndarray]
    counts: Mapping[str, int]
    seed: int

    @property
    def num_examples(self) -> int:
        """Examples of an epoch."""
        return sum(self.counts.values())

    @property
    def key(self) -> str:
        """Hash of all that decides an epoch, for resumption."""
        digest = hashlib.sha256(json.dumps(dict(self.counts)).encode())
        for rows in self.rows.values():
            digest.update(np.ascontiguousarray(rows, dtype=np.int64).data)
        return digest.hexdigest()[:16]

    def mean(self, values: np.ndarray) -> float:
        """Return the mean of values [N] of all examples over those of an epoch."""
        total = sum(count * values[self.rows[name]].mean() for name, count in self.counts.items() if count)
        return float(total / self.num_examples)

    def describe(self) -> str:
        """Return a line on what an epoch takes of each source."""
        parts = [
            f"{plain(name)} {count:,} from {len(self.rows[name]):,} rows ({count / self.num_examples:.1%})"
            for name, count in self.counts.items()
        ]
        return f"an epoch takes {self.num_examples:,} examples: {', '.join(parts)}"


@lru_cache(maxsize=2)
def mixed_order(mixture: Mixture, epoch: int) -> np.ndarray:
    """Return the indices of the examples of an epoch, in shuffled order: a function of the seed and the epoch.

    The rows of a source are dealt out in passes, each in an order of its own; an epoch continues where the one before
    it ended.
    """
    taken = []
    for number, (name, count) in enumerate(mixture.counts.items()):
        rows = mixture.rows[name]
        start, stop = epoch * count, (epoch + 1) * count
        passes = range(start // len(rows), -(-stop // len(rows)))
        dealt = [np.random.default_rng([mixture.seed, 0x50CE, number, i]).permutation(rows) for i in passes]
        if dealt:
            first = start - passes.start * len(rows)
            taken.append(np.concatenate(dealt)[first : first + count])
    return np.random.default_rng([mixture.seed, epoch]).permutation(np.concatenate(taken))


def mixture_of(
    sources: Mapping[str, np.ndarray], weights: Mapping[str, float] | None, temperature: float | None, seed: int
) -> Mixture | None:
    """Return the mixture that flags ask for, or None where they ask for none.

    Args:
        sources: indices of the training examples of each source, by name.
        weights: of --source_weights: an epoch takes so many times the rows of a source; once where it is not named.
        temperature: of --mixture_temperature.
        seed: decides which rows are taken, and their order.

    Raises:
        InputError: there is one source only, a name is unknown, or nothing is left.
    """
    if weights is None and temperature is None:
        return None
    flag = "--source_weights" if weights is not None else "--mixture_temperature"
    known = f"{', '.join(map(plain, list(sources)[:MAX_MEASURED]))}{', …' if len(sources) > MAX_MEASURED else ''}"
    if len(sources) < 2:
        raise InputError(
            f"{flag} has no effect: all training rows have one source, {known} (the text in their column `{SOURCE}`): "
            "remove it, or name the source in each row"
        )
    numbers = {name: len(rows) for name, rows in sources.items()}
    if weights is not None:
        unknown = [name for name in weights if name not in sources]
        if unknown:
            raise InputError(f"{flag}: there is no source {plain(', '.join(unknown))}: name some of {known}")
        targets = {name: weights.get(name, 1.0) * count for name, count in numbers.items()}
    else:
        assert temperature is not None
        powers = {name: math.exp(math.log(count) / temperature) for name, count in numbers.items()}
        targets = {name: sum(numbers.values()) * power / sum(powers.values()) for name, power in powers.items()}
    counts = {name: max(1, round(target)) if target else 0 for name, target in targets.items()}
    if not any(counts.values()):
        raise InputError(f"{flag} leaves no row: give one of {known} a weight above 0")
    return Mixture(sources, counts, seed)
