"""Write a table like the Tulu 3 SFT mixture: same columns, sources and row sizes (3.1 kB on average), invented text.

Run from the repository root: python -m benchmarks.make_tulu_like --num_rows 94000 --output_dir FOLDER
Writes FOLDER/tulu-like-train-00000-of-0000N.arrow, Arrow streams as `datasets` keeps them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa

# Sources of about the mixture's proportions, in thousands of rows.
SOURCES = {
    "flan_v2": 90, "open_math_2": 50, "wildguardmixtrain": 50, "numinamath_tir": 64, "personahub_math": 150,
    "evol_codealpaca": 107, "wildjailbreak": 50, "personahub_code": 35, "wildchat": 100, "sciriff": 10,
    "table_gpt": 5, "aya": 100, "personahub_if": 30, "oasst1": 7, "coconot": 11, "no_robots": 10,
    "personahub_gsm": 50, "algebra": 20,
}  # fmt: skip
MESSAGE = pa.struct([("content", pa.string()), ("role", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("messages", pa.list_(MESSAGE)), ("source", pa.string())])
BATCH_ROWS = 1000
SHARD_ROWS = 160_000


def text_pool(rng: np.random.Generator, length: int = 4_000_000) -> str:
    """Return prose-like text with quotes, line breaks and some letters beyond ASCII, to be cut from."""
    syllables = ["ka", "lo", "mi", "ter", "son", "ing", "re", "é", "ü", "st", "an", "ou", "漢", "字", "x1", "th"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(5000)]
    ends = [" ", " ", " ", " ", " ", " ", ", ", ". ", ".\n", '" ', "\n\n"]
    count = length // 6
    return "".join(
        f"{words[w]}{ends[e]}"
        for w, e in zip(rng.integers(0, 5000, count), rng.integers(0, len(ends), count), strict=True)
    )


def batch(rng: np.random.Generator, pool: str, first: int, num_rows: int, names: np.ndarray) -> pa.RecordBatch:
    """Return `num_rows` conversations of 1 to 4 turns with log-normal lengths."""
    turns = rng.choice([1, 1, 1, 1, 2, 2, 3, 4], num_rows)
    num_messages = int(turns.sum()) * 2
    # Means of the logarithm of the number of characters: of a user's message, and of an assistant's.
    means = np.where(np.arange(num_messages) % 2 == 0, 5.9, 6.75)
    lengths = np.clip(np.exp(means + 0.9 * rng.standard_normal(num_messages)), 5, 40_000).astype(int)
    starts = (rng.random(num_messages) * (len(pool) - lengths)).astype(int)
    rows = [
        {"content": pool[start : start + length], "role": "assistant" if i % 2 else "user"}
        for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
    ]
    offsets = np.concatenate([[0], np.cumsum(turns * 2)])
    messages = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(rows, MESSAGE))
    sources = pa.array([f"ai2-adapt-dev/{name}" for name in names])
    ids = pa.array([f"row_{first + i}" for i in range(num_rows)])
    return pa.RecordBatch.from_arrays([ids, messages, sources], schema=SCHEMA)


def make(num_rows: int, folder: Path, seed: int = 0) -> list[Path]:
    """Write the shards, and return their paths."""
    rng = np.random.default_rng(seed)
    pool = text_pool(rng)
    weights = np.array(list(SOURCES.values()))
    names = np.array(list(SOURCES))[np.sort(rng.choice(len(SOURCES), num_rows, p=weights / weights.sum()))]
    num_shards = max(1, -(-num_rows // SHARD_ROWS))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"tulu-like-train-{i:05d}-of-{num_shards:05d}.arrow" for i in range(num_shards)]
    for index, path in enumerate(paths):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for first in range(index * SHARD_ROWS, min((index + 1) * SHARD_ROWS, num_rows), BATCH_ROWS):
                count = min(BATCH_ROWS, num_rows - first, (index + 1) * SHARD_ROWS - first)
                writer.write_batch(batch(rng, pool, first, count, names[first : first + count]))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_rows", type=int, default=94_000)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    written = make(arguments.num_rows, arguments.output_dir, arguments.seed)
    print(f"{len(written)} shards, {sum(path.stat().st_size for path in written) / 1e6:,.0f} MB")
