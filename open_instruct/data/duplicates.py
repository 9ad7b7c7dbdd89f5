"""Rows that stand in two sets: found by hashes of their conversations, exact and normalised.

A hash has 64 bits. Between 939,343 training rows and 500 held-out ones, two that differ share one with a chance of
3e-11.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from open_instruct.data.sources import tools_of
from open_instruct.data.templates import Rendered
from open_instruct.errors import InputError

EXACT, NORMALISED = "exact_hash", "normalised_hash"  # columns of tokenised data
HASH_FIELDS = [pa.field(EXACT, pa.int64()), pa.field(NORMALISED, pa.int64())]
BETWEEN = "\0"  # between roles and contents; no punctuation, so it stays, and ASCII, for which all is faster


def is_ignored(character: str) -> bool:
    """Return whether a character is white space or punctuation (Unicode's classes Z and P)."""
    return character.isspace() or unicodedata.category(character)[0] in "PZ"


IGNORED_ASCII = bytes(code for code in range(128) if is_ignored(chr(code)))


@cache
def kept_characters() -> np.ndarray:
    """Return [65536] bool, by code: which characters of the basic plane stay; the last stands for those beyond it."""
    return np.array([code == 0xFFFF or not is_ignored(chr(code)) for code in range(0x10000)])


def normalised(text: str) -> bytes:
    """Return a text without upper case, white space and punctuation, in UTF-8."""
    text = text.lower()
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        kept = codes[kept_characters()[np.minimum(codes, 0xFFFF)]]
        text = kept.tobytes().decode("utf-32-le", "surrogatepass")
    return text.encode(errors="surrogatepass").translate(None, IGNORED_ASCII)


def conversation_text(messages: Sequence[dict[str, Any]]) -> str:
    """Return a conversation as one text: roles, contents, and whatever else its messages hold.

    Of a question that a template made, it is the row's own values: the same row is equal under every template, and
    behind every exemplar. The tools that the row offers are part of it.
    """
    parts = []
    for message in messages:
        content = "" if message["content"] is None else message["content"]
        if isinstance(content, Rendered):
            if content.own is None:
                continue
            content = content.own
        parts += [message["role"], content]
        if len(message) > 2:
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            others = {key: value for key, value in others.items() if value is not None}  # Arrow fills what is missing
            parts += [json.dumps(others, sort_keys=True, default=str)] if others else []
    if tools := tools_of(messages):
        parts.append(json.dumps(tools, sort_keys=True, default=str))
    return BETWEEN.join(parts)


def hash_of(text: bytes, seed: int = 0) -> int:
    """Return a 64-bit hash, the same on every machine, as a signed number; a seed gives another one."""
    digest = hashlib.blake2b(text, digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little", signed=True)


def hashes_of(messages: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the hashes of a conversation, exact and normalised."""
    text = conversation_text(messages)
    return hash_of(text.encode(errors="surrogatepass")), hash_of(normalised(text))


@dataclass(frozen=True)
class Overlap:
    """Which held-out rows stand in the training data, too."""

    exact: np.ndarray  # [N] bool, of the held-out rows
    nearly: np.ndarray  # [N] bool: not exactly, but for case, white space and punctuation
    are_dropped: bool  # they are left out of the held-out rows

    @property
    def kept(self) -> np.ndarray:
        """Positions of the held-out rows that are used.

        Raises:
            InputError: none is left.
        """
        if not self.are_dropped:
            return np.arange(len(self.exact))
        kept = np.flatnonzero(~(self.exact | self.nearly))
        if len(kept) == 0:
            raise InputError(
                f"--drop_held_out_duplicates leaves none of the {len(self.exact):,} held-out rows, as each stands in "
                "the training data: hold out others with --validation_file, or drop the flag"
            )
        return kept

    def counts(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return {"exact": int(self.exact.sum()), "normalised": int(self.nearly.sum()), "left_out": self.are_dropped}

    def describe(self) -> str:
        """Return a line."""
        num_exact, num_nearly, num_rows = int(self.exact.sum()), int(self.nearly.sum()), len(self.exact)
        if not num_exact + num_nearly:
            return f"held out: none of the {num_rows:,} rows stands in the training data"
        how = f"{num_exact:,} exactly, {num_nearly:,} but for case, white space and punctuation"
        if self.are_dropped:
            left_out = f"{num_exact + num_nearly:,} of {num_rows:,} rows left out"
            return f"held out: {left_out}, as they stand in the training data ({how})"
        return (
            f"held out: {num_exact + num_nearly:,} of {num_rows:,} rows stand in the training data, too ({how}); "
            "--drop_held_out_duplicates leaves them out"
        )


def overlap_of(train: Iterable[np.ndarray], held_out: Iterable[np.ndarray], are_dropped: bool) -> Overlap:
    """Compare two sets.

    Args:
        train: hashes [M] of the training rows, exact and normalised.
        held_out: hashes [N] of the held-out rows, likewise.
        are_dropped: leave the held-out rows that stand in both out of use.
    """
    exact, similar = (is_among(own, others) for own, others in zip(held_out, train, strict=True))
    return Overlap(exact, similar & ~exact, are_dropped)


def is_among(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return which values [N] are among the others [M]. Only the values are sorted: the others are many more."""
    own = np.unique(values)
    if not len(own):
        return np.zeros(0, bool)
    nearest = own[np.minimum(np.searchsorted(own, others), len(own) - 1)]
    found: np.ndarray = np.isin(values, others[nearest == others])
    return found
