"""Training steps of the packed forward pass against PEFT's padded one: time, tokens per second, memory, and the floor.

Run from the repository root on an otherwise idle machine:

    python -m benchmarks.shared_prefix                    # speed and memory, about 10 minutes on 2 cores
    python -m benchmarks.shared_prefix --only prompt-200  # one row
    python -m benchmarks.shared_prefix --only hard        # a hard prompt of 500 tokens, shared or before each example
    python -m benchmarks.shared_prefix --compile          # with compiled decoder layers, and the graphs counted
    python -m benchmarks.shared_prefix --shape llama-1b --device cuda --dtypes bfloat16

Each step has the same examples in both arms and the losses are compared. The peer is `PeftModel` on right-padded rows,
in the order drawn, with its own loss. Tokens are real ones: no padding, no virtual tokens. The floor is 4 × parameters
× real tokens operations (a frozen base: forward, and backward through activations) at the rate of a large matrix
product measured here. Random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import open_instruct.quiet  # noqa: F401
from open_instruct.data import packing
from open_instruct.data.packing import Packing, to_device
from open_instruct.flags import default_values
from open_instruct.methods import METHODS
from open_instruct.model import backends
from open_instruct.model.backends import blocked
from open_instruct.model.training_model import PackedModel, causal_of
from open_instruct.training.forward import ROW_TOKENS

SHAPES = {  # hidden size, feed-forward size, layers, query heads, key/value heads, vocabulary
    "llama-40m": (512, 1408, 8, 8, 8, 32_000),
    "llama-1b": (2048, 8192, 16, 32, 8, 128_256),
}
# Lengths of GSM8K's training conversations (Qwen 2.5's tokenizer, Tulu template) at shares of the data. 64 % of the
# tokens are labelled.
GSM8K_SHARES = [0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1]
GSM8K_LENGTHS = [75, 106, 117, 135, 149, 164, 179, 198, 218, 243, 286, 323, 362, 401, 480, 547]
GSM8K_LABELLED = 0.64


def gsm8k_lengths(rng: np.random.Generator, count: int) -> list[int]:
    """Draw lengths from GSM8K's distribution."""
    return np.interp(rng.random(count), GSM8K_SHARES, GSM8K_LENGTHS).astype(int).tolist()


def tulu_lengths(rng: np.random.Generator, count: int) -> list[int]:
    """Draw long-tailed lengths: log-normal, sigma 0.8, mean 400, at most 2,048."""
    return np.clip(rng.lognormal(math.log(400) - 0.32, 0.8, count), 16, 2048).astype(int).tolist()


# name: (method, virtual tokens, lengths, rows of a padded micro-batch, dtypes)
SPEED: dict[str, tuple[str, int, Callable[..., list[int]], int, list[str]]] = {
    "prompt-200": ("prompt_tuning", 200, gsm8k_lengths, 16, ["float32", "bfloat16"]),
    "prompt-200-by-4": ("prompt_tuning", 200, gsm8k_lengths, 4, ["float32"]),
    "prompt-20-tulu": ("prompt_tuning", 20, tulu_lengths, 16, ["float32"]),
    "prefix-200": ("prefix_tuning", 200, gsm8k_lengths, 16, ["float32"]),
    "lora": ("lora", 0, gsm8k_lengths, 16, ["float32"]),
    "lora-tulu": ("lora", 0, tulu_lengths, 16, ["float32"]),
}


# name: (method, virtual tokens); 16 examples of GSM8K's lengths behind a hard prompt
HARD: dict[str, tuple[str, int]] = {
    "hard-500-prompt-20": ("prompt_tuning", 20),
    "hard-500-prefix-20": ("prefix_tuning", 20),
    "hard-500-lora": ("lora", 0),
}
HARD_TOKENS = 500


def make_model(method: str, num_virtual_tokens: int, shape: tuple[int, ...], dtype: str, device: str) -> Any:
    """Return a random Llama with an adapter."""
    torch.manual_seed(0)
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    sizes: dict[str, Any] = dict(zip(names, shape, strict=True))
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=8192, **sizes)
    base = LlamaForCausalLM(config).to(device, getattr(torch, dtype))
    tokenizer: Any = SimpleNamespace(
        all_special_ids=[], added_tokens_decoder={}, get_vocab=lambda: {str(i): i for i in range(1000)}
    )
    values = default_values(
        num_virtual_tokens=num_virtual_tokens,
        prompt_tuning_init="sample_vocab",
        prefix_init="zero",
        lora_rank=16,
        lora_dropout=0.0,
    )
    return METHODS[method].wrap(base, tokenizer, METHODS[method].settings(values)).train()


def draw(rng: np.random.Generator, lengths: list[int], vocab_size: int) -> list[dict[str, Any]]:
    """Draw examples of random tokens, the last part labelled."""
    return [
        {"input_ids": rng.integers(3, vocab_size, n).tolist(), "spans": [round(n * (1 - GSM8K_LABELLED)), n]}
        for n in lengths
    ]


def padded_step(model: Any, examples: list[dict[str, Any]], size: int, device: str) -> float:
    """Do a step by PEFT's forward and loss, in micro-batches of `size`; return the mean loss of a labelled token."""
    total = sum(end - start for start, end in (e["spans"] for e in examples))
    loss = 0.0
    for start in range(0, len(examples), size):
        rows = examples[start : start + size]
        batch = to_device(packing.pad(rows, 0), torch.device(device))
        part = model(**batch, use_cache=False).loss * (sum(e["spans"][1] - e["spans"][0] for e in rows) / total)
        part.backward()
        loss += part.item()
    return loss


def packed_step(packed: PackedModel, batching: Packing, examples: list[dict[str, Any]], device: str) -> float:
    """Do the same step, packed; return the same mean."""
    total = sum(end - start for start, end in (e["spans"] for e in examples))
    lengths = np.array([len(e["input_ids"]) for e in examples])
    loss = 0.0
    for chosen in batching.micro_batches(range(len(examples)), lengths, 0, 1):
        part = packed(**to_device(batching.collate([examples[i] for i in chosen]), torch.device(device)))[0] / total
        part.backward()
        loss += part.item()
    return loss


def timed(step: Callable[[], float], model: Any, device: str) -> tuple[float, float]:
    """Return (loss, seconds) of a step."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    synchronise(device)
    started = time.perf_counter()
    loss = step()
    synchronise(device)
    return loss, time.perf_counter() - started


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def switch_compiled(model: Any, on: bool) -> None:
    """Compile the decoder layers (torch keeps the graphs), or run them as they are."""
    for layer in causal_of(model).get_decoder().layers:
        layer._compiled_call_impl = None
        if on:
            layer.compile(dynamic=True)


def product_rate(dtype: str, device: str) -> float:
    """Return the operations per second of a large matrix product."""
    size = 8192 if device == "cuda" else 2048
    matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    best = math.inf
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(5):
            matrix @ matrix
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / 5)
    return 2 * size**3 / best


def speed(name: str, dtype: str, arguments: argparse.Namespace) -> str:
    """Return one row of the table: medians over steps, arms interleaved."""
    method, virtual, lengths_of, size, _ = SPEED[name]
    shape, device = SHAPES[arguments.shape], arguments.device
    vocab_size = shape[-1]
    model = make_model(method, virtual, shape, dtype, device)
    batching = Packing(ROW_TOKENS)
    backend = backends.backend_names(None, torch.device(device), getattr(torch, dtype))[0]
    make_packed = partial(PackedModel, model, partial(METHODS[method].soft_prompt, model), backends.BACKENDS[backend])
    torch._dynamo.utils.counters.clear()
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    tokens, differences = [], []
    for repetition in range(arguments.steps + 1):
        examples = draw(rng, lengths_of(rng, 16), vocab_size)
        switch_compiled(model, False)
        padded = partial(padded_step, model, examples, size, device)
        expected, padded_seconds = timed(padded, model, device)
        with make_packed() as packed:
            switch_compiled(model, arguments.compile)
            loss, packed_seconds = timed(partial(packed_step, packed, batching, examples, device), model, device)
        differences.append(abs(loss - expected) / expected)
        if repetition:  # the first is a warm-up
            times["padded"].append(padded_seconds)
            times["packed"].append(packed_seconds)
            tokens.append(sum(len(e["input_ids"]) for e in examples))
    assert max(differences) < (1e-5 if dtype == "float32" else 1e-2), differences
    seconds = {arm: float(np.median(values)) for arm, values in times.items()}
    ratio = float(np.median(np.array(times["padded"]) / np.array(times["packed"])))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    floor = 4 * frozen * float(np.mean(tokens)) / product_rate(dtype, device)
    real = float(np.median(tokens))
    graphs = f" {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs |" if arguments.compile else ""
    return (
        f"| {name} | {dtype} | {seconds['padded']:.2f} | {real / seconds['padded']:,.0f} | {seconds['packed']:.2f} | "
        f"{real / seconds['packed']:,.0f} | **{ratio:.2f}×** | {floor:.2f} | {seconds['packed'] / floor:.2f} | "
        f"{seconds['padded'] / floor:.2f} | {max(differences):.0e} |{graphs}"
    )


def hard_speed(name: str, dtype: str, arguments: argparse.Namespace) -> str:
    """Return one row of the table of hard prompts: packed rows with the text once, and with it before each example."""
    method, virtual = HARD[name]
    shape, device = SHAPES[arguments.shape], arguments.device
    model = make_model(method, virtual, shape, dtype, device)
    backend = backends.BACKENDS[backends.backend_names(None, torch.device(device), getattr(torch, dtype))[0]]
    make_packed = partial(PackedModel, model, partial(METHODS[method].soft_prompt, model), backend)
    head = make_packed().head_name
    rng = np.random.default_rng(0)
    hard = tuple(rng.integers(3, shape[-1], HARD_TOKENS).tolist())
    times: dict[str, list[float]] = {"repeated": [], "shared": []}
    differences = []
    for repetition in range(arguments.steps + 1):
        examples = draw(rng, gsm8k_lengths(rng, 16), shape[-1])
        behind = [packing.behind_context({**example, "context": hard}, 0) for example in examples]
        losses = {}
        for arm, rows, text in (("repeated", behind, ()), ("shared", examples, hard)):
            with make_packed(head, text) as packed:
                step = partial(packed_step, packed, Packing(ROW_TOKENS), rows, device)
                losses[arm], seconds = timed(step, model, device)
            if repetition:  # the first is a warm-up
                times[arm].append(seconds)
        differences.append(abs(losses["shared"] - losses["repeated"]) / losses["repeated"])
    assert max(differences) < (1e-5 if dtype == "float32" else 1e-2), differences
    seconds = {arm: float(np.median(values)) for arm, values in times.items()}
    ratio = float(np.median(np.array(times["repeated"]) / np.array(times["shared"])))
    return (
        f"| {name} | {dtype} | {seconds['repeated']:.2f} | {seconds['shared']:.2f} | **{ratio:.2f}×** | "
        f"{max(differences):.0e} |"
    )


def memory_of(name: str, arm: str) -> None:
    """Print peak and growth of memory over one step, in MB; run in a process of its own."""
    if name == "vocabulary":
        model = make_model("prompt_tuning", 20, (512, 1408, 8, 8, 8, 128_256), "float32", "cpu")
        lengths = [2048, 2048]
    else:
        model = make_model("prefix_tuning", 20, (512, 1408, 16, 8, 8, 2_000), "float32", "cpu")
        lengths = [1024] * 4
    examples = draw(np.random.default_rng(0), lengths, 2_000)
    step: Callable[[], float] = partial(padded_step, model, examples, len(examples), "cpu")
    if arm != "padded":
        method = METHODS["prompt_tuning" if name == "vocabulary" else "prefix_tuning"]
        packed = PackedModel(model, partial(method.soft_prompt, model), blocked)
        packed.activate()  # for as long as this process lives
        if arm == "checkpointing":
            packed.causal.gradient_checkpointing_enable({"use_reentrant": False})
        step = partial(packed_step, packed, Packing(sum(lengths)), examples, "cpu")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew, at what is held now
    before = high_water_mark()
    step()
    print(json.dumps({"peak": high_water_mark(), "growth": high_water_mark() - before}))


def high_water_mark() -> float:
    """Return the largest resident memory of this process, in MB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def memory(name: str, arms: tuple[str, str]) -> str:
    """Return one row of the table of memory: the first arm is the reference."""
    measured = []
    for arm in arms:
        command = [sys.executable, "-m", "benchmarks.shared_prefix", "--memory-of", name, arm]
        # Large blocks from the system, not from glibc's heap: its fragments made both arms' peaks up to four times what
        # lived.
        variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    reference, ours = measured
    return (
        f"| {name} | {arms[0]}: {reference['peak']:,.0f} (step {reference['growth']:,.0f}) "
        f"| {arms[1]}: {ours['peak']:,.0f} (step {ours['growth']:,.0f}) "
        f"| {ours['peak'] / reference['peak']:.2f}× | **{ours['growth'] / reference['growth']:.2f}×** |"
    )


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*SPEED, *HARD, "hard", "memory"])
    parser.add_argument("--steps", type=int, default=3, help="measured steps per row, after one to warm up")
    parser.add_argument("--shape", choices=SHAPES, default="llama-40m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtypes", nargs="*", help="precisions to measure instead of those of each row")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers of the packed arm")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(*arguments.memory_of)
        return 0
    if arguments.only is None or arguments.only in SPEED:
        columns = ["steps of 16 examples", "dtype", "PEFT s", "tokens/s", "packed s", "tokens/s", "ratio", "floor s"]
        columns += ["packed/floor", "PEFT/floor", "loss off"]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for name, row in SPEED.items():
            for dtype in (arguments.dtypes or row[-1]) if arguments.only in (None, name) else []:
                print(speed(name, dtype, arguments), flush=True)
    if arguments.only in (None, "hard", *HARD):
        print("\n| steps of 16 examples | dtype | before each s | shared s | ratio | loss off |\n" + "|---" * 6 + "|")
        for name in HARD:
            for dtype in (arguments.dtypes or ["float32"]) if arguments.only in (None, "hard", name) else []:
                print(hard_speed(name, dtype, arguments), flush=True)
    if arguments.only in (None, "memory") and arguments.device == "cpu":
        print(
            "\n| peak memory of a step, MB | reference | ours | whole process | the step alone |\n|---|---|---|---|---|"
        )
        print(memory("vocabulary", ("padded", "packed")), flush=True)
        print(memory("checkpointing", ("packed", "checkpointing")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
