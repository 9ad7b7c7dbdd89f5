"""First and second start on a data set of 94,000 conversations: from file to the first collated batch.

Run from the repository root: python -m benchmarks.cached_start --tokenizer FOLDER

Imports and the model are not counted: both are the same with and without a cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

import arrow2json
from benchmarks.make_tulu_like import make
from open_instruct.data import chat, dataset, packing, reading
from open_instruct.data.plan import Plan


def start(path: Path, tokenizer: object, cache: Path) -> float:
    """Return the seconds to the first batch, as the trainer makes it."""
    started = time.perf_counter()
    key = dataset.file_key([path])
    named = reading.conversations(reading.read_rows(path))
    examples = dataset.build(named, tokenizer, 2048, key, cache)  # type: ignore[arg-type]
    train, _ = dataset.hold_out(examples, 0.02, 500, 42)
    plan = Plan(len(train), 16, 1, 42)
    packing.pad([train[int(i)] for i in plan.examples(0)], 0)
    return time.perf_counter() - started


def main() -> None:
    """Time both starts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="assets/tiny-model")
    parser.add_argument("--num_rows", type=int, default=94_000)
    a = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    chat.set_chat_template(tokenizer, "tulu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make(a.num_rows, folder / "shards")
        path = folder / "rows.jsonl"
        assert arrow2json.main([*map(str, shards), "-o", str(path)]) == 0
        first, second = (start(path, tokenizer, folder / "cache") for _ in range(2))
        size = path.stat().st_size / 1e6
        print(
            f"{a.num_rows:,} rows, {size:,.0f} MB: "
            f"first start {first:.1f} s ({size / first:.0f} MB/s), second {second:.2f} s"
        )


if __name__ == "__main__":
    main()
