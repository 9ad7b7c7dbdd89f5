"""A step of distillation against PEFT's way: time, and memory of the step.

Run from the repository root on an otherwise idle machine:

    python -m benchmarks.distillation                       # 10 to 20 minutes on 2 cores

The peer does what PEFT's example of Cartridges does: the teacher reads the context anew for each example, in padded
rows, and the student is a `PeftModel` on padded rows; both make all logits. Ours is the run's own forward pass: the
context's keys and values are computed once a run, which has a column of its own. Losses are compared. Random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.shared_prefix import draw, gsm8k_lengths, high_water_mark, make_model, packed_step, timed
from open_instruct.data import packing
from open_instruct.data.context import Context
from open_instruct.data.packing import Packing
from open_instruct.methods import METHODS
from open_instruct.model.backends import blocked
from open_instruct.model.distillation import DistillationSettings, DistilledModel
from open_instruct.training.forward_settings import ROW_TOKENS

SHAPE = (256, 704, 4, 4, 4, 8_000)
NUM_VIRTUAL_TOKENS = 128
EXAMPLES = 8
MEAN_LENGTH = 300
SIZES = {2_000: 8, 16_000: 2}  # context: rows of a padded micro-batch


def make_arms(length: int) -> tuple[Any, DistilledModel, Context]:
    """Return a random Llama with a prefix, the same as a run distils it, and its context."""
    model = make_model("prefix_tuning", NUM_VIRTUAL_TOKENS, SHAPE, "float32", "cpu")
    causal = model.get_base_model()
    causal.config.max_position_embeddings = length + 2048
    ids = np.random.default_rng(1).integers(3, SHAPE[-1], length).tolist()
    context = Context(tuple(ids), 0, False)
    soft_prompt = partial(METHODS["prefix_tuning"].soft_prompt, model)
    settings = DistillationSettings("", None, "forward", 1.0)
    return model, DistilledModel(model, soft_prompt, blocked, "linear", context, settings), context


def examples_of(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return examples of GSM8K's lengths, scaled to a mean of MEAN_LENGTH."""
    lengths = [round(length * MEAN_LENGTH / 204) for length in gsm8k_lengths(rng, EXAMPLES)]
    return draw(rng, lengths, SHAPE[-1])


def padded_step(model: Any, context: Context, examples: list[dict[str, Any]], size: int) -> float:
    """Do a step in PEFT's way; return the mean divergence of a labelled token."""
    total = sum(example["spans"][1] - example["spans"][0] for example in examples)
    loss = 0.0
    for start in range(0, len(examples), size):
        batch = packing.pad(examples[start : start + size], 0)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        rows, width = inputs["input_ids"].shape
        whole = {
            "input_ids": torch.cat([torch.tensor(context.ids).expand(rows, -1), inputs["input_ids"]], 1),
            "attention_mask": torch.cat([torch.ones(rows, len(context.ids)).long(), inputs["attention_mask"]], 1),
        }
        with torch.no_grad(), model.disable_adapter():
            wanted = model.get_base_model()(**whole, use_cache=False).logits[:, -width:][:, :-1].log_softmax(-1)
        logits = model(**inputs, use_cache=False).logits[:, -width:][:, :-1].log_softmax(-1)
        labelled = batch["labels"][:, 1:] != packing.IGNORE
        part = F.kl_div(logits[labelled], wanted[labelled], reduction="sum", log_target=True) / total
        part.backward()
        loss += part.item()
    return loss


def speed(length: int, steps: int) -> str:
    """Return one row of the table of time: medians, arms interleaved."""
    model, distilled, context = make_arms(length)
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"PEFT": [], "ours": []}
    first, differences = 0.0, []
    for repetition in range(steps + 1):
        examples = examples_of(rng)
        expected, seconds = timed(partial(padded_step, model, context, examples, SIZES[length]), model, "cpu")
        times["PEFT"].append(seconds)
        with distilled:
            if not repetition:
                with torch.no_grad(), distilled.without_adapter():
                    _, first = timed(lambda: distilled.context_prompt(torch.device("cpu"))[0].length, model, "cpu")
            loss, seconds = timed(partial(packed_step, distilled, Packing(ROW_TOKENS), examples, "cpu"), model, "cpu")
        times["ours"].append(seconds)
        differences.append(abs(loss / expected - 1))
    assert max(differences) < 1e-3, differences
    theirs, ours = (float(np.median(values[1:])) for values in times.values())
    ratio = float(np.median(np.array(times["PEFT"][1:]) / np.array(times["ours"][1:])))
    return f"| {length:,} | {theirs:.2f} | {ours:.2f} | **{ratio:.1f}×** | {first:.2f} | {max(differences):.0e} |"


def memory_of(length: int, arm: str) -> None:
    """Print the growth of memory over one step, in MB; run in a process of its own."""
    model, distilled, context = make_arms(length)
    examples = examples_of(np.random.default_rng(0))
    if arm == "ours":
        distilled.activate()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew, at what is held now
    before = high_water_mark()
    if arm == "ours":  # the context's own computation included
        packed_step(distilled, Packing(ROW_TOKENS), examples, "cpu")
    else:
        padded_step(model, context, examples, SIZES[length])
    print(json.dumps(high_water_mark() - before))


def memory(length: int) -> str:
    """Return one row of the table of memory."""
    growth = []
    for arm in ("PEFT", "ours"):
        command = [sys.executable, "-m", "benchmarks.distillation", "--memory_of", str(length), arm]
        variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
        growth.append(json.loads(done.stdout.splitlines()[-1]))
    return f"| {length:,} | {growth[0]:,.0f} | {growth[1]:,.0f} | **{growth[1] / growth[0]:.2f}×** |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one to warm up")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(int(arguments.memory_of[0]), arguments.memory_of[1])
        return
    print(f"| context tokens | PEFT's way, s a step of {EXAMPLES} | ours | ratio | context, once | loss off |")
    print("|---|---|---|---|---|---|")
    for length in SIZES:
        print(speed(length, arguments.steps), flush=True)
    print("\n| context tokens | memory of a step, PEFT's way, MB | ours | ratio |\n|---|---|---|---|")
    for length in SIZES:
        print(memory(length), flush=True)


if __name__ == "__main__":
    main()
