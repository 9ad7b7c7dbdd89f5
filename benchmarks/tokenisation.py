"""Tokens and loss masks: one pass with offsets, against counting the tokens of rendered prefixes message by message.

Run from the repository root:
    python -m benchmarks.tokenisation --tokenizer FOLDER [--file CONVERSATIONS.jsonl] [--num_rows 2000]

Counting prefixes is what open-instruct does for each row (an implementation of our own). Both arms run in this process,
interleaved; masks are compared on every row. The bare tokenizer on the same texts is the floor.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.make_tulu_like import text_pool
from open_instruct.data import chat, reading


def by_counting(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Return token ids and the labelled positions, found by tokenising prefixes.

    A prefix is rendered and tokenised for the start and the end of every message that is not the assistant's.
    """

    def count(until: int, prompt: bool = False) -> int:
        text = tokenizer.apply_chat_template(messages[:until], tokenize=False, add_generation_prompt=prompt)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    masked: set[int] = set()
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            before_answer = index + 1 < len(messages) and messages[index + 1]["role"] == "assistant"
            masked |= set(range(count(index) if index else 0, count(index + 1, prompt=before_answer)))
    return ids, [position for position in range(len(ids)) if position not in masked]


def invented(num_rows: int) -> list[list[dict[str, Any]]]:
    """Return conversations of 1 to 4 turns of invented text."""
    import numpy as np

    rng, pool = random.Random(0), text_pool(np.random.default_rng(0), 400_000)
    rows = []
    for _ in range(num_rows):
        messages = []
        for turn in range(2 * rng.choice([1, 1, 2, 3, 4])):
            start, length = rng.randrange(len(pool) - 3000), rng.randint(20, 1500)
            messages.append(
                {"role": "assistant" if turn % 2 else "user", "content": "x" + pool[start : start + length]}
            )
        rows.append(messages)
    return rows


def main() -> None:
    """Time both arms and the floor, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="assets/tiny-model")
    parser.add_argument("--file", type=Path, help="conversations (default: invented ones of 1 to 4 turns)")
    parser.add_argument("--num_rows", type=int, default=2000)
    a = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    chat.set_chat_template(tokenizer, "tulu")
    named = reading.conversations(reading.read_rows(a.file)) if a.file else enumerate(invented(a.num_rows))
    batch = [messages for _, messages in islice(named, a.num_rows)]
    texts, _ = chat.render(tokenizer, batch)
    times: dict[str, list[float]] = {"one pass": [], "counting": [], "bare tokenizer": []}
    for _ in range(3):
        started = time.perf_counter()
        ids, spans = chat.tokenize(tokenizer, batch, 2**31)
        times["one pass"].append(time.perf_counter() - started)
        started = time.perf_counter()
        counted = [by_counting(tokenizer, messages) for messages in batch]
        times["counting"].append(time.perf_counter() - started)
        started = time.perf_counter()
        tokenizer(texts, add_special_tokens=False)
        times["bare tokenizer"].append(time.perf_counter() - started)
    ours = [
        (row, [i for start, end in row_spans for i in range(start, end)])
        for row, row_spans in zip(ids, spans, strict=True)
    ]
    equal = sum(row == counted_row for row, counted_row in zip(ours, counted, strict=True))
    tokens = sum(map(len, ids))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<15} {seconds:6.2f} s  {tokens / seconds:>10,.0f} tokens/s")
    ratio, share = medians["counting"] / medians["one pass"], medians["bare tokenizer"] / medians["one pass"]
    print(f"one pass is {ratio:.1f} times as fast as counting; the bare tokenizer takes {share:.0%} of its time")
    print(f"ids and masks are equal on {equal} of {len(batch)} rows")


if __name__ == "__main__":
    main()
