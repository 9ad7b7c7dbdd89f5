"""Conversations → tokenised examples in Arrow, memory-mapped and cached, split into training and held-out rows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat
from open_instruct.errors import InputError

TOKENISATION_VERSION = 1  # raise it whenever the same conversation gives other ids or spans
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("spans", pa.list_(pa.int32()))])
BATCH_ROWS = 1000


@dataclass
class Examples:
    """Tokenised conversations: `table` has columns input_ids and spans, `rows` says which of its rows belong here."""

    table: pa.Table
    rows: np.ndarray
    fingerprint: str
    num_read: int = 0
    num_truncated: int = 0
    num_skipped: int = 0
    lengths: np.ndarray = field(init=False)  # tokens of each example
    label_counts: np.ndarray = field(init=False)  # labelled tokens of each example that are predicted

    def __post_init__(self) -> None:
        """Lengths are looked up for every step; count them once."""
        lengths, spans = pc.list_value_length(self.table["input_ids"]), self.table["spans"].combine_chunks()
        bounds = spans.flatten().to_numpy(zero_copy_only=False)
        offsets = spans.offsets.to_numpy(zero_copy_only=False)
        signed = bounds * np.where(np.arange(len(bounds)) % 2 == 0, -1, 1)
        totals = np.add.reduceat(np.append(signed, 0), offsets[:-1]) if len(offsets) > 1 else np.zeros(0, int)
        starts_at_zero = bounds[offsets[:-1]] == 0 if len(offsets) > 1 else np.zeros(0, bool)
        self.lengths = lengths.to_numpy()[self.rows]
        self.label_counts = (totals - starts_at_zero)[self.rows]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example as {"input_ids": [int], "spans": [start, end, …]}."""
        row = int(self.rows[index])
        return {name: self.table[name][row].as_py() for name in SCHEMA.names}

    def subset(self, indices: np.ndarray) -> Examples:
        """The examples at `indices`, in that order."""
        return Examples(
            self.table, self.rows[indices], self.fingerprint, self.num_read, self.num_truncated, self.num_skipped
        )

    def describe(self, name: str) -> str:
        """One line of statistics."""
        lengths, labels = self.lengths, self.label_counts
        percentiles = "/".join(f"{value:.0f}" for value in np.percentile(lengths, [50, 90, 99]))
        return (
            f"{name}: {len(self):,} conversations, {lengths.sum():,} tokens (mean {lengths.mean():.0f}, 50/90/99 % {percentiles}, "
            f"longest {lengths.max()}), {labels.sum():,} labelled ({labels.sum() / lengths.sum():.0%}); "
            f"of {self.num_read:,} read, {self.num_truncated:,} truncated, {self.num_skipped:,} without a label left skipped"
        )


def build(
    named_conversations: Iterable[tuple[str, list[dict[str, Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source_key: str,
    cache_dir: Path | None,
    overwrite_cache: bool = False,
) -> Examples:
    """Tokenise conversations, or memory-map the result of an earlier run with the same source, tokenizer and length.

    Args:
        named_conversations: (place, messages) pairs, consumed only when the cache doesn't have them.
        tokenizer: a fast tokenizer with its chat template set.
        max_length: tokens of a conversation kept.
        source_key: hash of the source's content.
        cache_dir: folder of the cache; None keeps the result in memory.
        overwrite_cache: tokenise again.

    Raises:
        InputError: no conversation has a labelled token left.
    """
    parts = [TOKENISATION_VERSION, source_key, tokenizer_key(tokenizer), str(tokenizer.chat_template), max_length]
    fingerprint = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    entry = cache_dir / fingerprint if cache_dir else None
    if entry is None:
        counts = new_counts()
        table = pa.concat_tables(
            [SCHEMA.empty_table(), *tokenize_all(named_conversations, tokenizer, max_length, counts)]
        )
    else:
        if overwrite_cache or not (entry / "counts.json").exists():
            fill_cache(entry, named_conversations, tokenizer, max_length)
        counts = json.loads((entry / "counts.json").read_text())
        table = pa.ipc.open_stream(pa.memory_map(str(entry / "tokens.arrow"))).read_all()
    if table.num_rows == 0:
        if counts["num_read"] == 0:
            raise InputError("the data holds no conversation: nothing can be trained on")
        raise InputError(
            f"none of the {counts['num_read']} conversations has a labelled token within --max_seq_length {max_length}: raise it "
            f"(the assistant's first answer begins after {counts['first_label']} tokens at the earliest)"
        )
    return Examples(
        table,
        np.arange(table.num_rows),
        fingerprint,
        counts["num_read"],
        counts["num_truncated"],
        counts["num_skipped"],
    )


def new_counts() -> dict[str, int]:
    """What is counted while tokenising. `first_label`: where the earliest answer begins, in tokens."""
    return {"num_read": 0, "num_truncated": 0, "num_skipped": 0, "first_label": 0}


def tokenize_all(
    named_conversations: Iterable[tuple[str, list[dict[str, Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: dict[str, int],
) -> Iterator[pa.Table]:
    """Tokenise batch by batch; rows without a label that can be predicted are left out. Updates `counts`."""
    with tqdm(desc="tokenising", unit=" rows", disable=None, delay=2) as progress:
        for batch in batches(named_conversations, BATCH_ROWS):
            ids, spans = chat.tokenize(tokenizer, [messages for _, messages in batch], 2**31)
            rows: dict[str, list[list[int]]] = {"input_ids": [], "spans": []}
            for row_ids, row_spans in zip(ids, spans, strict=True):
                counts["num_truncated"] += len(row_ids) > max_length
                for start, _ in row_spans[:1]:
                    counts["first_label"] = min(counts["first_label"] or start, start)
                kept = [(start, min(end, max_length)) for start, end in row_spans if start < max_length]
                if not any(end > max(start, 1) for start, end in kept):
                    counts["num_skipped"] += 1
                    continue
                rows["input_ids"].append(row_ids[:max_length])
                rows["spans"].append([bound for span in kept for bound in span])
            counts["num_read"] += len(batch)
            yield pa.table(rows, schema=SCHEMA)
            progress.update(len(batch))


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides how text becomes ids."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def fill_cache(
    entry: Path,
    named_conversations: Iterable[tuple[str, list[dict[str, Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> None:
    """Tokenise into a folder of its own and rename it, so that processes that start together can't see half a cache."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    counts = new_counts()
    try:
        with pa.OSFile(str(working / "tokens.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for table in tokenize_all(named_conversations, tokenizer, max_length, counts):
                writer.write_table(table)
        (working / "counts.json").write_text(json.dumps(counts))
        if entry.exists():
            shutil.rmtree(entry)
        os.replace(working, entry)
    except OSError:
        if not (entry / "counts.json").exists():  # else another process was faster with the same content
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)


def hold_out(examples: Examples, fraction: float, most: int, seed: int) -> tuple[Examples, Examples | None]:
    """Split off `fraction` of the examples (at least 1, at most `most`), drawn by seed.

    Returns:
        (training examples, held-out examples or None where fraction is 0).
    """
    if fraction == 0:
        return examples, None
    if len(examples) < 2:
        raise InputError(
            "only one conversation can be trained on: set --validation_fraction 0 or give a --validation_file"
        )
    count = max(1, min(most, round(fraction * len(examples))))
    mixed = np.random.default_rng([seed, 0x5EED]).permutation(len(examples))
    return examples.subset(np.sort(mixed[count:])), examples.subset(np.sort(mixed[:count]))


def draw(examples: Examples, most: int | None, seed: int) -> Examples:
    """At most `most` examples, drawn by seed, in their old order."""
    if most is None or most >= len(examples):
        return examples
    return examples.subset(np.sort(np.random.default_rng([seed, 0xD1A3]).permutation(len(examples))[:most]))


def file_key(paths: Sequence[Path]) -> str:
    """Hash of the content of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(
                hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else file.read()
            )
    return digest.hexdigest()
