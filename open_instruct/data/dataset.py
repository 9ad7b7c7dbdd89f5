"""Conversations → tokenised examples in Arrow, memory-mapped and cached, split into training and held-out rows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, duplicates, token_cache
from open_instruct.data.bad_rows import BadRows
from open_instruct.data.context import ContextTokens
from open_instruct.data.sources import NO_SOURCE, SOURCE
from open_instruct.data.spans import Labels
from open_instruct.data.token_cache import schema_of
from open_instruct.data.tokenising import new_counts, tokenize_all
from open_instruct.errors import InputError
from open_instruct.files import sha256

TOKENISATION_VERSION = 5  # raise it whenever the same conversation gives another row
TOKENISERS = ("tokenizers", "transformers", "jinja2")  # packages that decide them, too


@dataclass
class Examples:
    """Tokenised conversations, as rows of a table that may hold others too."""

    # input_ids; spans: the bounds [start, end, start, end, …] of what is labelled; maybe context, and answers: the
    # bounds of the assistant's turns, where something else is labelled
    table: pa.Table
    rows: np.ndarray  # [N]: the rows of the table that belong here
    fingerprint: str  # of the source's content, the tokenizer and the length, whatever is labelled
    num_read: int = 0  # conversations
    num_truncated: int = 0  # conversations
    num_skipped: int = 0  # conversations without a label left
    bad_rows: str = ""  # how many rows were left out because they can't be used, and the first of them
    by_template: str = ""  # lines on what the chat template leaves out
    table_content: str = ""  # hash of the table's values; empty: computed when it is needed
    entry: Path | None = None  # folder of the token cache that holds the table; None: it is in memory
    lengths: np.ndarray = field(init=False)  # [N]: tokens of each example
    label_counts: np.ndarray = field(init=False)  # [N]: labelled tokens of each example that are predicted

    def __post_init__(self) -> None:
        """Count tokens and labels once: every step looks them up.

        The labels of a row are the sum over its spans of end - start, which is the sum of its bounds with alternating
        sign. A token at position 0 may be labelled, but nothing stands before it to
        predict it from, so it is not counted.
        """
        lengths, spans = pc.list_value_length(self.table["input_ids"]), self.table["spans"].combine_chunks()
        bounds = spans.flatten().to_numpy(zero_copy_only=False)
        offsets = spans.offsets.to_numpy(zero_copy_only=False)
        signed = bounds * np.where(np.arange(len(bounds)) % 2 == 0, -1, 1)
        # The 0 appended lets an offset stand at the end; no row is without a span, which `reduceat` would sum wrongly.
        totals = np.add.reduceat(np.append(signed, 0), offsets[:-1]) if len(offsets) > 1 else np.zeros(0, int)
        starts_at_zero = bounds[offsets[:-1]] == 0 if len(offsets) > 1 else np.zeros(0, bool)
        self.lengths = lengths.to_numpy()[self.rows]
        self.label_counts = (totals - starts_at_zero)[self.rows]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example as {"input_ids": [int], "spans": [start, end, …]}, maybe with a context or answers."""
        row = int(self.rows[index])
        fields = (field for field in self.table.schema if pa.types.is_list(field.type))  # tokens and their bounds
        return {field.name: self.table[field.name][row].as_py() for field in fields}

    def subset(self, indices: np.ndarray) -> Examples:
        """Return the examples at `indices`, in that order."""
        return replace(self, rows=self.rows[indices])

    def by_answers(self) -> Examples:
        """Return the same rows with the assistant's turns labelled, whatever is learned of them."""
        if "answers" not in self.table.column_names:
            return self
        position = self.table.column_names.index("spans")
        table = self.table.set_column(position, "spans", self.table["answers"]).drop_columns(["answers"])
        return replace(self, table=table, table_content="")

    @cached_property
    def sources(self) -> dict[str, np.ndarray]:
        """Indices of the examples of each source, by name, in the order of the names."""
        if SOURCE not in self.table.column_names:
            return {NO_SOURCE: np.arange(len(self))}
        encoded = self.table[SOURCE].combine_chunks().dictionary_encode()
        names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()[self.rows]
        by_name = {name or NO_SOURCE: np.flatnonzero(codes == code) for code, name in enumerate(names)}
        return {name: by_name[name] for name in sorted(by_name) if len(by_name[name])}

    @property
    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes [N] of the conversations, exact and normalised; see `duplicates`."""
        exact, normalised = (
            self.table[name].to_numpy()[self.rows] for name in (duplicates.EXACT, duplicates.NORMALISED)
        )
        return exact, normalised

    def labelled(self, name: str, max_length: int) -> Examples:
        """Return the rows of which something is learned; the others count as skipped.

        Args:
            name: what the rows are, for the error.
            max_length: tokens kept of a conversation.

        Raises:
            InputError: there are none.
        """
        kept = np.flatnonzero(self.label_counts)
        if len(kept) == len(self):
            return self
        if len(kept) == 0:
            raise InputError(
                f"--labels last: the last answer of none of the {len(self)} {name} conversations lies within "
                f"--max_seq_length {max_length}: raise it, or learn from all answers with --labels answers"
            )
        return replace(self, rows=self.rows[kept], num_skipped=self.num_skipped + len(self) - len(kept))

    @property
    def context_lengths(self) -> np.ndarray:
        """Tokens [N] of each example's own context."""
        if "context" not in self.table.column_names:
            return np.zeros(len(self), int)
        lengths: np.ndarray = pc.list_value_length(self.table["context"]).to_numpy()[self.rows]
        return lengths

    def has_one_context(self, ids: Sequence[int]) -> bool:
        """Return whether these tokens are each example's own context."""
        column = self.table["context"].combine_chunks().take(pa.array(self.rows))
        if not (self.context_lengths == len(ids)).all():
            return False
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(self), len(ids))
        return bool((values == np.asarray(ids)).all())

    @cached_property
    def content(self) -> str:
        """Hash of the examples' ids and spans, in their order, whatever they were read from."""
        table = self.table_content or token_cache.content_of(self.table)
        rows = hashlib.sha256(np.ascontiguousarray(self.rows, dtype=np.int64).data)
        return hashlib.sha256(f"{table} {rows.hexdigest()}".encode()).hexdigest()[:16]

    def describe(self, name: str) -> str:
        """Return one line of statistics; `name` begins it."""
        lengths, labels = self.lengths, self.label_counts
        percentiles = "/".join(f"{value:.0f}" for value in np.percentile(lengths, [50, 90, 99]))
        return (
            f"{name}: {len(self):,} conversations, {lengths.sum():,} tokens "
            f"(mean {lengths.mean():.0f}, 50/90/99 % {percentiles}, longest {lengths.max()}), "
            f"{labels.sum():,} labelled ({labels.sum() / lengths.sum():.0%}); of {self.num_read:,} read, "
            f"{self.num_truncated:,} truncated, {self.num_skipped:,} without a label left skipped"
        )


def build(
    named_conversations: Iterable[tuple[str, list[dict[str, Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source_key: str,
    cache_dir: Path | None,
    overwrite_cache: bool = False,
    bad: BadRows | None = None,
    contexts: ContextTokens | None = None,
    labels: Labels = "answers",
    num_left_out: int = 0,
) -> Examples:
    """Tokenise conversations, or memory-map the result of an earlier run with the same source, tokenizer and length.

    Args:
        named_conversations: (source, messages) pairs, consumed only when the cache doesn't have them.
        tokenizer: a fast tokenizer with its chat template set.
        max_length: tokens of a conversation kept.
        source_key: hash of the source's content.
        cache_dir: folder of the cache; None keeps the result in memory.
        overwrite_cache: tokenise again.
        bad: takes the errors of single rows, those of `named_conversations` included; None: the first one is raised.
        contexts: tokenises the rows' own contexts, which begin their messages (see `ContextSource`); None: they have
            none.
        labels: what is learned. It decides no rows: those without an answer left are skipped by each rule, and of
            those kept, some may have no label (see `Examples.labelled`).
        num_left_out: first tokens of every row that are left out, as what stands before all rows begins with them.

    Raises:
        InputError: no conversation has an answer left, or there were bad rows and `bad` does not skip them.
    """
    parts = [TOKENISATION_VERSION, source_key, tokenizer_key(tokenizer), str(tokenizer.chat_template), max_length]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    counts, schema = new_counts(), schema_of(contexts is not None, labels != "answers")
    tables = tokenize_all(named_conversations, tokenizer, max_length, counts, bad, contexts, labels, num_left_out)
    if cache_dir is None:
        tokenised = token_cache.in_memory(tables, counts, schema)
    else:
        entry = cache_dir / (fingerprint if labels == "answers" else f"{fingerprint}-{labels}")
        tokenised = token_cache.load_or_fill(entry, tables, counts, overwrite_cache, schema)
    table, counts = tokenised.table, tokenised.counts
    if table.num_rows == 0:
        if counts["num_read"] == 0:
            raise InputError("the data holds no conversation: nothing can be trained on")
        none = f"none of the {counts['num_read']} conversations has a labelled token"
        if counts["by_template"] and not counts["first_label"]:
            raise InputError(f"{none}: {counts['by_template'].splitlines()[-1]}")
        if not counts["first_label"]:
            raise InputError(f"{none}: their answers are empty, or the chat template does not write them")
        raise InputError(
            f"{none} within --max_seq_length {max_length}: raise it "
            f"(the assistant's first answer begins after {counts['first_label']} tokens at the earliest)"
        )
    return Examples(
        table,
        np.arange(table.num_rows),
        fingerprint,
        counts["num_read"],
        counts["num_truncated"],
        counts["num_skipped"],
        counts["bad_rows"],
        counts["by_template"],
        tokenised.content,
        tokenised.entry,
    )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides how text becomes ids, and which special tokens a template writes."""
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    versions = [importlib.metadata.version(name) for name in TOKENISERS]
    kind = "pairs" if chat.makes_pairs(tokenizer) else type(tokenizer).__name__
    parts = [kind, tokenizer.backend_tokenizer.to_str(), special, versions]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def hold_out(examples: Examples, fraction: float, max_held_out: int, seed: int) -> tuple[Examples, Examples | None]:
    """Split off `fraction` of the examples, drawn by seed: at least 1, and no more than `max_held_out`.

    Returns:
        (training examples, held-out examples or None where fraction is 0).

    Raises:
        InputError: there is only one example.
    """
    if fraction == 0:
        return examples, None
    if len(examples) < 2:
        raise InputError(
            "only one conversation can be trained on: set --validation_fraction 0 or give a --validation_file"
        )
    num_held_out = max(1, min(max_held_out, round(fraction * len(examples))))
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(examples))
    return examples.subset(np.sort(order[num_held_out:])), examples.subset(np.sort(order[:num_held_out]))


def draw(examples: Examples, max_examples: int | None, seed: int) -> Examples:
    """Return at most `max_examples` examples (None: all), drawn by seed, in their old order."""
    if max_examples is None or max_examples >= len(examples):
        return examples
    return examples.subset(np.sort(np.random.default_rng([seed, 0xD1A3]).permutation(len(examples))[:max_examples]))


def file_key(paths: Sequence[Path]) -> str:
    """Return a hash of the content of files, which names their cache."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()
