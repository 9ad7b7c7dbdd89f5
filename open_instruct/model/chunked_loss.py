"""Token loss over a large vocabulary in pieces, so that the logits of a micro-batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from open_instruct.model.evaluation_mode import evaluating

Head = Callable[[torch.Tensor], torch.Tensor]
LossOfPiece = Callable[[torch.Tensor, slice], torch.Tensor]

# Logits that exist at once, in elements: 32 MB of float32 stay in a CPU's cache; a GPU wants larger matrix products.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}
MIN_ROWS_OF_A_TRAINED_HEAD = 1024  # each piece adds a gradient as large as the head


def chunked_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, vocab_size: int, trained: list[nn.Parameter]
) -> Any:
    """Return the summed cross-entropy of head(hidden) against the targets; see `chunked_loss`.

    (`torch.nn.functional.linear_cross_entropy` does the same for linear heads, and was 2 to 10 times slower on CPU with
    torch 2.13: `benchmarks/RESULTS.md`.)

    Args:
        hidden: [N, D], the state that predicts each target.
        targets: [N], token ids.
        head: [n, D] → logits [n, V].
        vocab_size: V, which decides how many positions make a piece.
        trained: parameters of the head that want a gradient.

    Returns:
        Scalar, float32, in nats.
    """

    def loss(logits: torch.Tensor, at: slice) -> torch.Tensor:
        return F.cross_entropy(logits, targets[at], reduction="sum")

    return chunked_loss(hidden, head, loss, vocab_size, trained)


def chunked_loss(
    hidden: torch.Tensor, head: Head, loss: LossOfPiece, vocab_size: int, trained: list[nn.Parameter]
) -> Any:
    """Return a loss that is a sum over positions.

    Each piece's gradient is computed with its loss, in the forward pass, and only the gradient is kept: one pass over
    the head, where recomputing logits in the backward pass takes two. Works for any head that treats positions alone.

    Args:
        hidden: [N, D]
        head: [n, D] → logits [n, V].
        loss: float32 logits [n, V] of a piece, and where it is in N → its summed loss.
        vocab_size: V, which decides how many positions make a piece.
        trained: parameters of the head that want a gradient.

    Returns:
        Scalar, float32.
    """
    num_rows = rows_at_once(hidden.device, vocab_size, bool(trained))
    return _ChunkedLoss.apply(hidden, head, loss, num_rows, *trained)


def rows_at_once(device: torch.device, vocab_size: int, trained: bool) -> int:
    """Return the number of positions whose logits exist at once.

    Args:
        device: where they are computed.
        vocab_size: V
        trained: the head has parameters that want a gradient.
    """
    rows = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // vocab_size
    return max(rows, MIN_ROWS_OF_A_TRAINED_HEAD if trained else 1)


class _ChunkedLoss(torch.autograd.Function):
    """A sum over positions whose gradient is computed in the forward pass.

    With logits z_i = head(h_i; θ) [V] of position i, and for cross-entropy its target t_i:

        L         = Σ_i (log Σ_v exp z_iv - z_i,t_i)
        dL/dz_iv  = softmax(z_i)_v - [v = t_i]
        dL/dh_i   = (dz_i/dh_i)ᵀ dL/dz_i
        dL/dθ     = Σ_i (dz_i/dθ)ᵀ dL/dz_i

    Both gradients need the logits of position i and nothing of other positions. The piece that computes its loss holds
    these logits anyway, and they are gone by the time of the backward pass. So the gradients are taken here, where they
    cost no second product with the head, and [N, D] is kept instead of [N, V]. They are those of L itself. If the loss
    that is differentiated is f(L), as when a step's sum is divided by its number of tokens, the chain rule multiplies
    them by f'(L), a scalar: that is all that is left for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, loss: LossOfPiece, num_rows: int, *trained: torch.Tensor
    ) -> torch.Tensor:
        """Return L, from pieces of `num_rows` positions; hidden [N, D], head [n, D] → [n, V]."""
        total = torch.zeros((), device=hidden.device)
        needs_gradient = any(ctx.needs_input_grad)  # not in evaluation
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grads_of_head = [torch.zeros_like(parameter) for parameter in trained] if needs_gradient else []
        for start in range(0, len(hidden), num_rows):
            # A leaf of its own, so that autograd stops here and frees the piece's logits with its graph.
            at = slice(start, start + num_rows)
            piece = hidden[at].detach().requires_grad_(needs_gradient)
            with torch.set_grad_enabled(needs_gradient):  # autograd switches it off within a forward pass
                loss_of_piece = loss(head(piece).float(), at)
            total += loss_of_piece.detach()
            if grad_hidden is not None:
                grad_hidden[at], *grads_of_piece = torch.autograd.grad(loss_of_piece, (piece, *trained))
                for grad_of_head, grad_of_piece in zip(grads_of_head, grads_of_piece, strict=True):
                    grad_of_head += grad_of_piece
        ctx.save_for_backward(grad_hidden, *grads_of_head)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Return the kept gradients times that of the sum, a scalar."""
        grad_hidden, *grads_of_head = ctx.saved_tensors
        return grad_hidden * grad_output, None, None, None, *(grad * grad_output for grad in grads_of_head)


def head_forms(causal: Any) -> dict[str, Head]:
    """Return the known functions from the decoder's last hidden state [n, D] to the logits [n, V], by name.

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
    """Return the name of the form that gives the model's own logits, by trying all on it, or None if none does.

    None, too, if the model doesn't say which part of it is the decoder. Then its own forward pass has to make the
    logits.

    Args:
        causal: a causal language model of `transformers`.
    """
    decoder = causal.get_decoder()
    # transformers 5.23 names Llama 4's whole text model here, and of ModernBERT's decoder the output layer.
    if decoder is causal or not isinstance(decoder, PreTrainedModel):
        return None
    ids = torch.arange(4, device=causal.get_output_embeddings().weight.device)[None]
    with evaluating(causal), torch.no_grad():
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        expected = causal(input_ids=ids, use_cache=False).logits.float()
        differences = {
            name: (form(hidden).float() - expected).abs().max().item() for name, form in head_forms(causal).items()
        }
        tolerance = 1e-2 * expected.abs().max().item()  # rounding of 16 bits
    # The nearest form, not the first that is near: small logits hardly feel a soft cap.
    nearest = min(differences, key=lambda name: differences[name])
    return nearest if differences[nearest] <= tolerance else None
