"""Token loss over a large vocabulary in pieces, so that the logits of a micro-batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Head = Callable[[torch.Tensor], torch.Tensor]

# Logits that exist at once, in elements: 32 MB of float32 stay in a CPU's cache; a GPU wants larger matrix products.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
MIN_ROWS_OF_A_TRAINED_HEAD = 1024  # each piece adds a gradient as large as the head


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, vocab_size: int, trained: list[nn.Parameter]
) -> Any:
    """Summed cross-entropy of head(hidden) against the targets.

    Each piece's gradient is computed with its loss, in the forward pass, and only the gradient is kept: one pass over the
    head, where recomputing logits in the backward pass takes two. Works for any head that treats positions alone.
    (`torch.nn.functional.linear_cross_entropy` does the same for linear heads, and was 2 to 10 times slower on CPU with torch 2.13:
    `benchmarks/RESULTS.md`.)

    Args:
        hidden: [N, D], the state before each target.
        targets: [N], token ids.
        head: [n, D] → logits [n, V].
        vocab_size: V, which decides how many positions make a piece.
        trained: parameters of the head that want a gradient.

    Returns:
        Scalar, float32, in nats.
    """
    return _ChunkedCrossEntropy.apply(
        hidden, targets, head, rows_at_once(hidden.device, vocab_size, bool(trained)), *trained
    )


def rows_at_once(device: torch.device, vocab_size: int, trained: bool) -> int:
    """Positions whose logits exist at once."""
    rows = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // vocab_size
    return max(rows, MIN_ROWS_OF_A_TRAINED_HEAD if trained else 1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head, rows: int, *trained: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_trained = [torch.zeros_like(parameter) for parameter in trained] if wanted else []
        for start in range(0, len(hidden), rows):
            piece = hidden[start : start + rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                loss = F.cross_entropy(head(piece).float(), targets[start : start + rows], reduction="sum")
            total += loss.detach()
            if grad_hidden is not None:
                grad_hidden[start : start + rows], *more = torch.autograd.grad(loss, (piece, *trained))
                for sum_so_far, part in zip(grad_trained, more, strict=True):
                    sum_so_far += part
        ctx.save_for_backward(grad_hidden, *grad_trained)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        grad_hidden, *grad_trained = ctx.saved_tensors
        return grad_hidden * grad_output, None, None, None, *(grad * grad_output for grad in grad_trained)


def head_forms(causal: Any) -> dict[str, Head]:
    """Known functions from the decoder's last hidden state [n, D] to the logits [n, V], by name.

    A head is a linear map, for some families followed by a scale (Granite, Cohere) or a soft cap (Gemma).
    """
    config = causal.config.get_text_config()
    linear = causal.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    forms: dict[str, Head] = {"linear": lambda x: linear(x), "scaled": lambda x: linear(x) * scale}
    if cap:
        forms["capped"] = lambda x: torch.tanh(linear(x) / cap) * cap
    return forms


def find_head(causal: Any) -> str | None:
    """Name of the form that gives the model's own logits, found by trying all on it; None if none does.

    Args:
        causal: a causal language model of `transformers`.
    """
    ids = torch.arange(4, device=causal.get_output_embeddings().weight.device)[None]
    was_training = causal.training
    causal.eval()
    with torch.no_grad():
        hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        expected = causal(input_ids=ids, use_cache=False).logits.float()
        off = {name: (form(hidden).float() - expected).abs().max().item() for name, form in head_forms(causal).items()}
        near = 1e-2 * expected.abs().max().item()  # rounding of 16 bits
    causal.train(was_training)
    # The nearest form, not the first that is near: small logits hardly feel a soft cap.
    nearest = min(off, key=lambda name: off[name])
    return nearest if off[nearest] <= near else None
