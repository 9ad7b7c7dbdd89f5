"""The two parts that the packed forward pass computes in its own way, against what PyTorch offers for them.

Run from the repository root: python -m benchmarks.attention_and_loss [--only attention]

Attention: 16 segments and a shared prefix, 8 heads of 64, one layer, forward and backward. Loss: 1,550 positions of
hidden size 512, forward and backward into the positions. Medians of interleaved runs on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.shared_prefix import gsm8k_lengths, tulu_lengths
from open_instruct.model.backends import blocked, sdpa
from open_instruct.model.chunked_loss import chunked_cross_entropy
from open_instruct.model.shared_prefix import AttentionInputs, Segments


def medians(arms: dict[str, Callable[[], torch.Tensor]], inputs: list[torch.Tensor], repeats: int) -> dict[str, float]:
    """Return the milliseconds of forward and backward of each arm; all must give the same gradients."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    gradients = {}
    for _ in range(repeats):
        for name, run in arms.items():
            for tensor in inputs:
                tensor.grad = None
            started = time.perf_counter()
            run().sum().backward()
            times[name].append(1e3 * (time.perf_counter() - started))
            gradients[name] = torch.cat([tensor.grad.flatten().float() for tensor in inputs if tensor.grad is not None])
    first = next(iter(gradients.values()))
    for gradient in gradients.values():
        assert (gradient - first).norm() / first.norm() < (1e-5 if inputs[0].dtype == torch.float32 else 3e-2)
    return {name: float(np.median(milliseconds)) for name, milliseconds in times.items()}


def attention(lengths: list[int], num_virtual: int, dtype: torch.dtype) -> dict[str, float]:
    """Time one layer over a row whose prefix is keys and values."""
    torch.manual_seed(0)
    ends = np.cumsum(lengths).tolist()
    segments = Segments(tuple(zip([0, *ends[:-1]], ends, strict=True)), 0, num_virtual)
    inputs = [torch.randn(1, 8, n, 64).to(dtype).requires_grad_() for n in (ends[-1],) * 3 + (num_virtual,) * 2]
    weight = torch.randn(1, ends[-1], 8, 64).to(dtype)
    layer = AttentionInputs(*inputs, segments=segments, scale=0.125, window=None, softcap=None)
    arms: dict[str, Any] = {"sdpa": lambda: sdpa(layer) * weight, "blocked": lambda: blocked(layer) * weight}
    return medians(arms, inputs, 7)


def loss(vocab_size: int, dtype: torch.dtype) -> dict[str, float]:
    """Time a frozen head."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(1550, 512).to(dtype).requires_grad_(), torch.randint(vocab_size, (1550,))
    head = (torch.randn(vocab_size, 512) * 0.02).to(dtype)
    arms: dict[str, Any] = {
        "all logits": lambda: F.cross_entropy((hidden @ head.T).float(), targets, reduction="sum"),
        "in pieces": lambda: chunked_cross_entropy(hidden, targets, lambda x: x @ head.T, vocab_size, []),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        arms["linear_cross_entropy"] = lambda: F.linear_cross_entropy(
            hidden, head, targets, reduction="sum", options=options
        )
    return medians(arms, [hidden], 3)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["attention", "loss"])
    only = parser.parse_args().only
    if only != "loss":
        print_attention()
    if only != "attention":
        print_loss()
    return 0


def print_attention() -> None:
    """Print the table of attention."""
    rng = np.random.default_rng(0)
    print("| one layer's attention | dtype | sdpa by segments | blocked | ratio |\n|---|---|---|---|---|")
    for name, lengths, num_virtual in (
        ("GSM8K lengths, P=200", gsm8k_lengths(rng, 16), 200),
        ("Tulu-like, P=20", tulu_lengths(rng, 16), 20),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            ms = attention(lengths, num_virtual, dtype)
            print(
                f"| {name} | {dtype} | {ms['sdpa']:.0f} ms | {ms['blocked']:.0f} ms "
                f"| {ms['sdpa'] / ms['blocked']:.2f}× |",
                flush=True,
            )


def print_loss() -> None:
    """Print the table of the loss."""
    print(
        "\n| loss of 1,550 positions | dtype | all logits | in pieces | torch's linear_cross_entropy |\n"
        "|---|---|---|---|---|"
    )
    for vocab_size in (32_000, 128_000):
        for dtype in (torch.float32, torch.bfloat16):
            ms = loss(vocab_size, dtype)
            cells = " | ".join(f"{value:,.0f} ms" for value in ms.values())
            print(f"| vocabulary {vocab_size:,} | {dtype} | {cells} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
