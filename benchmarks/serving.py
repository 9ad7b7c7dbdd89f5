"""Requests per second and time to the first token of a server, by kind of adapter.

    bash scripts/serve.sh output/serving/merged --port 8000 … &
    python -m benchmarks.serving --url http://127.0.0.1:8000 --model output/serving/merged --prompt prompt \
        --prefix prefix --lora lora

The server has to hold a soft prompt of embeddings and a prefix of the same length, and, with --lora, to serve a LoRA by
vLLM's own --enable-lora. Each kind answers the same questions with the same number of tokens. A cold prefix is one
after vLLM's cache was cleared; the server must run with VLLM_SERVER_DEV_MODE=1 for that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
import urllib.request
from typing import Any

NUM_TOKENS = 32
QUESTIONS = [f"question {number} small brave open narrow" for number in range(64)]


def stream(url: str, body: dict[str, Any]) -> tuple[float, float]:
    """Send a request; returns the seconds to the first token, and to the last."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, headers={"Content-Type": "application/json"})
    start, first = time.perf_counter(), 0.0
    with urllib.request.urlopen(request) as response:
        for line in response:
            if not first and b'"content":"' in line.replace(b'"content":""', b""):
                first = time.perf_counter() - start
    return first, time.perf_counter() - start


def body_of(model: str, adapter: str, question: str) -> dict[str, Any]:
    """Return a request for NUM_TOKENS tokens."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "chat_template_kwargs": {"adapter": adapter},
    }


def clear_cache(url: str) -> None:
    """Let vLLM forget its prefix cache."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/reset_prefix_cache", method="POST")).close()


def measure(url: str, model: str, adapter: str, in_flight: int) -> float:
    """Return requests per second, with a number of them in flight."""
    questions = iter(QUESTIONS)
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                question = next(questions, None)
            if question is None:
                return
            stream(url, body_of(model, adapter, question))

    threads = [threading.Thread(target=client) for _ in range(in_flight)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(QUESTIONS) / (time.perf_counter() - start)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--lora")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    kinds = {"base": (args.model, "base"), "prompt": (args.model, args.prompt), "prefix": (args.model, args.prefix)}
    if args.lora:
        kinds["LoRA (--enable-lora)"] = (args.lora, "base")
    for model, adapter in kinds.values():
        stream(args.url, body_of(model, adapter, "warm up"))
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    cold: dict[str, list[float]] = {kind: [] for kind in kinds}
    cached: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):  # interleaved, so that a slow minute hits all
        for kind, (model, adapter) in kinds.items():
            rates[kind].append(measure(args.url, model, adapter, 16))
            for question in QUESTIONS[:10]:
                clear_cache(args.url)
                cold[kind].append(stream(args.url, body_of(model, adapter, question))[0])
                cached[kind].append(stream(args.url, body_of(model, adapter, question[::-1]))[0])
    print("| kind | requests/s, 16 in flight | first token, ms: cold | cached |\n|---|---|---|---|")
    for kind in kinds:
        figures = (1000 * statistics.median(cold[kind]), 1000 * statistics.median(cached[kind]))
        print(f"| {kind} | {statistics.median(rates[kind]):.1f} | {figures[0]:.1f} | {figures[1]:.1f} |")


if __name__ == "__main__":
    main()
