"""Load a server of a merged checkpoint, with cancelled requests, for a while: every answer right, and memory flat.

    python -m tests.serving_load --url … --model CHECKPOINT --adapter NAME=DIR … --file heldout.jsonl --minutes 30 \
        --server PID

Run by scripts/test_serving.sh on a cache so small that requests are preempted. Of 10 requests 6 are checked, 2 are long
and cancelled by closing the connection, 2 are long and sampled. Exit code 1: something is wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import psutil

import open_instruct
from tests.serving_check import IN_FLIGHT, MAX_NEW_TOKENS, ask, wait_for


def cancelled(url: str, model: str, adapter: str, question: str, chunks: int) -> None:
    """Ask for a long answer, and leave after some chunks of it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "chat_template_kwargs": {"adapter": adapter},
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    for _ in range(chunks):
        response.readline()
    connection.close()


def memory(pid: int) -> float:
    """Return the memory of a process and its children that no other process shares, in MB."""
    server = psutil.Process(pid)
    return sum(process.memory_full_info().uss for process in [server, *server.children(recursive=True)]) / 1e6


def preemptions(url: str) -> float:
    """Return how many requests vLLM has preempted."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    return sum(map(float, re.findall(r"^vllm:num_preemptions_total\{.*\} (\S+)$", text, re.MULTILINE)))


def main() -> int:
    """Run the load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--file", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--server", type=int, required=True)
    args = parser.parse_args()
    served = open_instruct.load(args.adapter)
    names = ["base", *served.names]
    questions = [json.loads(line)["messages"][0]["content"] for line in Path(args.file).read_text().splitlines()][:50]
    sampling = open_instruct.Sampling(MAX_NEW_TOKENS)
    expected = {name: [texts[0] for texts in served.answers(questions, name, sampling)] for name in names}
    wait_for(args.url, args.server)
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    end = time.monotonic() + 60 * args.minutes

    def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end and len(wrong) < 20:
            name, index = rng.choice(names), rng.randrange(len(questions))
            kind = rng.choices(["checked", "cancelled", "sampled"], [6, 2, 2])[0]
            counts[kind] += 1
            if kind == "cancelled":
                cancelled(args.url, args.model, name, questions[index], rng.randrange(1, 100))
            elif kind == "sampled":
                ask(args.url, args.model, name, questions[index], max_tokens=400, ignore_eos=True, temperature=1)
            else:
                answer = ask(args.url, args.model, name, questions[index])
                text = answer["choices"][0]["message"]["content"].strip() if "choices" in answer else str(answer)
                if text != expected[name][index]:
                    wrong.append(f"{name}, row {index}: {text!r} instead of {expected[name][index]!r}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(IN_FLIGHT)]
    for thread in threads:
        thread.start()
    sizes = []
    while any(thread.is_alive() for thread in threads):
        sizes.append(memory(args.server))
        time.sleep(60 * args.minutes / 20)
        print(
            f"{dict(counts)}, {len(wrong)} wrong, {preemptions(args.url):.0f} preempted, {sizes[-1]:.0f} MB", flush=True
        )
    print(*wrong, sep="\n")
    growth = sizes[-1] / sizes[len(sizes) // 4]  # the first quarter fills caches
    print(f"{len(wrong)} wrong of {counts['checked']}, memory grew by {growth - 1:.1%} after the first quarter")
    return int(bool(wrong) or preemptions(args.url) == 0 or growth > 1.1)


if __name__ == "__main__":
    sys.exit(main())
