"""Ask a server of a merged checkpoint, and compare text and log-probabilities with base + adapter in PEFT.

    python -m tests.serving_check --url http://127.0.0.1:8000 --model CHECKPOINT --adapter a=DIR --adapter b=DIR \
        --file heldout.jsonl --server PID [--lora NAME=DIR]

Run by scripts/test_serving.sh. Every row of the file is asked of every adapter and of the base, 16 at a time, in
a random order. Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import open_instruct
from open_instruct.data.questions import prompt_ids
from open_instruct.serving.checkpoint import read_tokens

MAX_NEW_TOKENS = 24
IN_FLIGHT = 16
TOLERANCE = 1e-3  # of a log-probability, in float32


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request; returns the answer, or {"status", "error"}."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return {"status": error.code, "error": error.read().decode(errors="replace")}


def wait_for(url: str, server: int) -> None:
    """Wait until the server answers, as long as its process lives."""
    while True:
        os.kill(server, 0)
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return
        except OSError:
            time.sleep(0.5)


def ask(url: str, model: str, adapter: str, question: str, **options: Any) -> dict[str, Any]:
    """Ask one question of one adapter."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "return_token_ids": True,
        "chat_template_kwargs": {"adapter": adapter},
    }
    return post(f"{url}/v1/chat/completions", body | options)


@torch.no_grad()
def log_probabilities(served: Any, adapter: str, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-probability of each token of an answer, by PEFT's own forward pass."""
    model = served.adapters.use(adapter)
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, -len(answer) - 1 : -1].float()
    return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


def fits(served: Any, row: dict[str, Any]) -> bool:
    """Whether a question leaves room for an answer with any adapter."""
    length = len(prompt_ids(served.tokenizer, row["messages"][:1]))
    return length + MAX_NEW_TOKENS <= (served.max_length(*served.names) or length + MAX_NEW_TOKENS)


def check_answers(args: argparse.Namespace, served: Any, names: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Compare the answers to all rows by all adapters."""
    questions = [row["messages"][0]["content"] for row in rows]
    sampling = open_instruct.Sampling(MAX_NEW_TOKENS)
    expected = {name: [texts[0] for texts in served.answers(questions, name, sampling)] for name in names}
    loras = dict(word.split("=", 1) for word in args.lora)
    jobs = [(name, index) for name in names for index in range(len(rows))]
    random.Random(0).shuffle(jobs)

    def run(job: tuple[str, int]) -> dict[str, Any]:
        name, index = job
        model, adapter = (name, "base") if name in loras else (args.model, name)
        return ask(args.url, model, adapter, questions[index])

    start = time.perf_counter()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = list(pool.map(run, jobs))
    seconds = time.perf_counter() - start
    wrong, largest = [], 0.0
    equal = dict.fromkeys(names, 0)
    for (name, index), answer in zip(jobs, answers, strict=True):
        if "choices" not in answer:
            wrong.append(f"{name}, row {index}: {answer}")
            continue
        (choice,) = answer["choices"]
        text = choice["message"]["content"].strip()
        if text != expected[name][index]:
            wrong.append(f"{name}, row {index}: {text!r} instead of {expected[name][index]!r}")
            continue
        equal[name] += 1
        prompt = prompt_ids(served.tokenizer, rows[index]["messages"][:1])
        own = log_probabilities(served, name, prompt, choice["token_ids"])
        theirs = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])
        largest = max(largest, (own - theirs).abs().max().item())
    print(f"{len(jobs)} answers in {seconds:.1f} s, {IN_FLIGHT} in flight")
    print(*(f"  {name}: {number} of {len(rows)} texts are PEFT's" for name, number in equal.items()), sep="\n")
    print(f"  log-probabilities differ by at most {largest:.1e}")
    return [*wrong, *([f"log-probabilities differ by {largest:.1e}"] if not largest <= TOLERANCE else [])]


def check_samples(args: argparse.Namespace, names: list[str]) -> list[str]:
    """Sample 2,000 tokens at temperature 1.5 from each adapter: none of them stands for a virtual token."""
    tokens = read_tokens(Path(args.model))
    new = {entry["first"] + number for entry in tokens.values() for number in range(entry["number"])}
    wrong = []
    for name in names:
        options = {"max_tokens": 400, "temperature": 1.5, "seed": 1, "ignore_eos": True, "logprobs": False, "n": 5}
        answer = ask(args.url, args.model, name, "red green blue", **options)
        drawn = [token for choice in answer["choices"] for token in choice["token_ids"]]
        print(f"  {name}: {len(drawn)} tokens sampled, {len(new & set(drawn))} of them virtual")
        if len(drawn) != 2000 or new & set(drawn):
            wrong.append(f"{name}: sampled {len(drawn)} tokens, among them {sorted(new & set(drawn))[:5]}")
    return wrong


def check_refusals(args: argparse.Namespace, prefix: str, served: Any) -> list[str]:
    """An unknown adapter and a prefix whose placeholders would be computed are errors, and spoil nothing."""
    wrong = []
    question = "red green blue"
    first = ask(args.url, args.model, prefix, question)["choices"][0]["message"]["content"]
    unknown = ask(args.url, args.model, "nobody", question)
    if unknown.get("status") != 400 or "no adapter nobody" not in unknown.get("error", ""):
        wrong.append(f"an unknown adapter: {unknown}")
    computed = ask(args.url, args.model, prefix, question, prompt_logprobs=1)
    if computed.get("status") != 400 or "can't be computed" not in computed.get("error", ""):
        wrong.append(f"log-probabilities of a prefix: {computed}")
    bare = read_tokens(Path(args.model))[prefix]["text"]
    for what, prompt in {"with nothing after it": bare, "after other text": f"red {bare} green"}.items():
        body = {"model": args.model, "prompt": prompt, "max_tokens": 4, "add_special_tokens": False}
        answer = post(f"{args.url}/v1/completions", body)
        if answer.get("status") != 500:
            wrong.append(f"a prefix {what}: {answer}")
    again = ask(args.url, args.model, prefix, question)["choices"][0]["message"]["content"]
    if again != first:
        wrong.append(f"after the refusals {again!r} instead of {first!r}")
    print(f"  refusals: {len(wrong)} of 5 wrong")
    return wrong


def main() -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--lora", action="append", default=[])
    parser.add_argument("--file", required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--server", type=int, required=True, help="process id of the server")
    args = parser.parse_args()
    served = open_instruct.load([*args.adapter, *args.lora])
    names = ["base", *(word.split("=")[0] for word in [*args.adapter, *args.lora])]
    rows = [row for row in map(json.loads, Path(args.file).read_text().splitlines()) if fits(served, row)][: args.rows]
    wait_for(args.url, args.server)
    in_checkpoint = [name for name in names if name not in {word.split("=")[0] for word in args.lora}]
    prefix = next(n for n, entry in read_tokens(Path(args.model)).items() if entry["kind"] == "keys_values")
    wrong = [
        *check_answers(args, served, names, rows),
        *check_samples(args, in_checkpoint),
        *check_refusals(args, prefix, served),
        *check_answers(args, served, names, rows),  # now from vLLM's own prefix cache
    ]
    print(*wrong[:20], f"{len(wrong)} wrong", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
