"""Training steps of encoder–decoders on packed pairs against PEFT's padded ones, and the floor.

Run from the repository root on an otherwise idle machine:

    python -m benchmarks.encoder_decoder                    # about 10 minutes on 2 cores
    python -m benchmarks.encoder_decoder --only lora-gsm8k  # one row

The model has the shape of FLAN-T5-small (8 + 8 layers, hidden size 512, 6 heads, 32,128 tokens) and random weights.
Each step has the same 16 pairs in both arms, and the losses are compared. The peer is `PeftModel` on right-padded
pairs in micro-batches of 16, in the order drawn, with its own loss. Tokens are those of sources and targets. The floor
is 4 × parameters that a token meets × tokens operations at the rate of a large matrix product measured here. The limit
is how many times as many such operations padding costs: the ratio that leaving it out alone can reach.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

import open_instruct.quiet  # noqa: F401
from benchmarks.shared_prefix import GSM8K_LABELLED, gsm8k_lengths, product_rate, timed, tulu_lengths
from open_instruct.data.packing import to_device
from open_instruct.data.pairs import PairPacking, pad_pairs
from open_instruct.flags import default_values
from open_instruct.methods import METHODS
from open_instruct.model.encoder_decoder import PackedPairModel
from open_instruct.training.forward_pairs import ROW_TOKENS

VOCABULARY, PAIRS = 32_128, 16
LENGTHS: dict[str, Callable[..., list[int]]] = {"gsm8k": gsm8k_lengths, "tulu": tulu_lengths}
# name: (method, virtual tokens, lengths)
ROWS = {
    "lora-gsm8k": ("lora", 0, "gsm8k"),
    "prefix-gsm8k": ("prefix_tuning", 20, "gsm8k"),
    "prompt-gsm8k": ("prompt_tuning", 20, "gsm8k"),
    "prompt-100-gsm8k": ("prompt_tuning", 100, "gsm8k"),
    "lora-tulu": ("lora", 0, "tulu"),
    "prefix-tulu": ("prefix_tuning", 20, "tulu"),
    "prompt-tulu": ("prompt_tuning", 20, "tulu"),
}


def make_model(method: str, num_virtual_tokens: int, device: str) -> Any:
    """Return a random T5 with an adapter."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
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
    base = T5ForConditionalGeneration(config).to(device)
    return METHODS[method].wrap(base, tokenizer, METHODS[method].settings(values)).train()


def draw(rng: np.random.Generator, lengths: str) -> list[dict[str, Any]]:
    """Draw pairs of random tokens.

    GSM8K's sources and targets share its conversations' tokens as there; Tulu-like ones are half a conversation each,
    drawn apart.
    """
    totals = LENGTHS[lengths](rng, 2 * PAIRS)
    sources = [max(2, round(total * (1 - GSM8K_LABELLED) if lengths == "gsm8k" else total / 2)) for total in totals]
    pairs = []
    for index in range(PAIRS):
        target = totals[index] - sources[index] if lengths == "gsm8k" else sources[PAIRS + index]
        ids = rng.integers(3, VOCABULARY, sources[index] + target).tolist()
        pairs.append({"input_ids": ids, "spans": [sources[index], len(ids)]})
    return pairs


def padded_step(model: Any, pairs: list[dict[str, Any]], device: str) -> float:
    """Do a step by PEFT's forward and loss; return the mean loss of a label."""
    batch = to_device(pad_pairs(pairs, 0, 0), torch.device(device))
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss)


def packed_step(packed: PackedPairModel, batching: PairPacking, pairs: list[dict[str, Any]], device: str) -> float:
    """Do the same step, packed; return the same mean."""
    total = sum(end - start for start, end in (pair["spans"] for pair in pairs))
    lengths, loss = np.array([len(pair["input_ids"]) for pair in pairs]), 0.0
    for chosen in batching.micro_batches(range(len(pairs)), lengths, 0, 1):
        part = packed(**to_device(batching.collate([pairs[i] for i in chosen]), torch.device(device)))[0] / total
        part.backward()
        loss += part.item()
    return loss


def speed(name: str, steps: int, device: str) -> str:
    """Return one row of the table: medians over steps, arms interleaved."""
    method, virtual, lengths = ROWS[name]
    model, rng = make_model(method, virtual, device), np.random.default_rng(0)
    batching = PairPacking(ROW_TOKENS, 0, virtual if METHODS[method].prompt_kind == "embeddings" else 0)
    make_packed = partial(PackedPairModel, model, partial(METHODS[method].soft_prompt, model), None)
    times, tokens, padding, differences = [], [], [], []
    for repetition in range(steps + 1):
        pairs = draw(rng, lengths)
        expected, padded_seconds = timed(partial(padded_step, model, pairs, device), model, device)
        with make_packed() as packed:
            loss, packed_seconds = timed(partial(packed_step, packed, batching, pairs, device), model, device)
        differences.append(abs(loss - expected) / expected)
        if repetition:  # the first is a warm-up
            times.append((padded_seconds, packed_seconds))
            spans = [pair["spans"] for pair in pairs]
            targets = sum(end - start for start, end in spans)
            tokens.append((sum(len(pair["input_ids"]) for pair in pairs) - targets, targets))
            longest = max(start for start, _ in spans), max(end - start for start, end in spans)
            padding.append((PAIRS * longest[0], PAIRS * longest[1]))
    assert max(differences) < 1e-5, differences
    padded, packed_seconds = np.median(np.array(times), 0)
    ratio = float(np.median([slow / fast for slow, fast in times]))
    base = model.get_base_model()
    encoder, decoder = (
        sum(p.numel() for name, p in stack.block.named_parameters() if not p.requires_grad)
        for stack in (base.encoder, base.decoder)
    )
    of_targets = decoder + base.lm_head.weight.numel()
    sources, targets = np.mean(np.array(tokens), 0)
    padded_sources, padded_targets = np.mean(np.array(padding), 0)
    before_each = PAIRS * batching.num_virtual_tokens  # an encoder reads them with each source, padded or not
    operations = encoder * (sources + before_each) + of_targets * targets
    limit = (encoder * (padded_sources + before_each) + of_targets * padded_targets) / operations
    floor = 4 * operations / product_rate("float32", device)
    return (
        f"| {name} | {padded:.2f} | {(sources + targets) / padded:,.0f} | {packed_seconds:.2f} "
        f"| {(sources + targets) / packed_seconds:,.0f} | **{ratio:.2f}×** | {limit:.2f} | {floor:.2f} "
        f"| {packed_seconds / floor:.2f} | {padded / floor:.2f} | {max(differences):.0e} |"
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--steps", type=int, default=3, help="measured steps per row, after one to warm up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    columns = ["steps of 16 pairs", "PEFT s", "tokens/s", "packed s", "tokens/s", "ratio", "limit", "floor s"]
    columns += ["packed/floor", "PEFT/floor", "loss off"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in ROWS:
        if arguments.only in (None, name):
            print(speed(name, arguments.steps, arguments.device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
