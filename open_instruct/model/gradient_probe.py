"""Whether a quantised base passes the right gradient to its input, which is all that a soft prompt needs of a base.

A kernel without a derivative does not raise an error: the gradient reaches the input through the residual connections
alone, and training runs on it. So the gradient of a loss at the embeddings [T, D] is compared with the one that it has
where each quantised layer y = f(x) keeps its values and passes back ∂L/∂x = ∂L/∂y · W, W being its dequantised weights:
the gradient of the dequantised model, at the quantised one's activations. Where there are quantised weights without
known values, the comparison is with finite differences of the loss, along random directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from open_instruct.errors import InputError, one_line
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.quantised import dequantised_weight, other_quantised, quantised_layers

SMALLEST_COSINE = 0.99
NUM_TOKENS = 16
NUM_DIRECTIONS = 24  # of finite differences
STEP = 1e-2  # of finite differences, in parts of the embeddings' norm
SEED = 20


@dataclass(frozen=True)
class Probe:
    """A comparison of gradients at the embeddings.

    Args:
        cosine: cosine of the angle between the base's gradient and the reference; 0 where there is no gradient.
        norm_ratio: norm of the base's gradient in norms of the reference.
        num_layers: quantised linear layers.
        reference: "dequantised weights" or "finite differences".
    """

    cosine: float
    norm_ratio: float
    num_layers: int
    reference: str

    def text(self) -> str:
        """Return the figures in one line."""
        return (
            f"gradient at the embeddings: cosine {self.cosine:.5f}, {self.norm_ratio:.3f} of the norm, against "
            f"{self.reference} ({self.num_layers:,} quantised layers)"
        )

    def record(self) -> dict[str, Any]:
        """Return the figures for run.json."""
        return asdict(self)


class StraightThrough(torch.autograd.Function):
    """Values of a layer, with the gradient of its dequantised weights."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, outputs: Tensor, layer: Any) -> Tensor:
        """Return the layer's outputs [..., outputs], computed already from its inputs [..., inputs]."""
        ctx.layer, ctx.dtype = layer, inputs.dtype
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return ∂L/∂x = ∂L/∂y · W."""
        gradient = gradients[0].float()
        return (gradient @ dequantised_weight(ctx.layer).float()).to(ctx.dtype), None, None


@contextmanager
def differentiable(layers: dict[str, Any]) -> Iterator[None]:
    """Let layers pass back the gradient of their dequantised weights, for as long as the context lasts."""

    def replacement(layer: Any, forward: Any) -> Any:
        def compute(inputs: Tensor, *args: Any, **options: Any) -> Tensor:
            with torch.no_grad():
                outputs = forward(inputs.detach(), *args, **options)
            return StraightThrough.apply(inputs, outputs, layer)

        return compute

    own = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.forward = replacement(layer, layer.forward)
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__.pop("forward", None)
            if own[name] is not None:
                layer.forward = own[name]


def loss_at(model: Any, embeddings: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss of the tokens `ids` [1, T] after each other, with their embeddings [1, T, D] given."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(inputs_embeds=embeddings, use_cache=False, **more).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:])


def gradient_at(model: Any, embeddings: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient of the loss at the embeddings [1, T, D] in float32; zeros where none arrives."""
    values = embeddings.clone().requires_grad_()
    with torch.enable_grad():
        loss = loss_at(model, values, ids)
        if not loss.requires_grad:
            return torch.zeros_like(embeddings, dtype=torch.float32)
        (gradient,) = torch.autograd.grad(loss, values, allow_unused=True)
    return torch.zeros_like(embeddings, dtype=torch.float32) if gradient is None else gradient.float()


@torch.no_grad()
def slopes(model: Any, embeddings: Tensor, ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes of the loss along random directions: by the gradient, and by central differences.

    For a direction u of the embeddings' norm, the slopes are g · u and (L(x + εu) − L(x − εu)) / 2ε, with ε = `STEP`.
    """
    generator = torch.Generator().manual_seed(SEED)
    by_gradient, measured = [], []
    for _ in range(NUM_DIRECTIONS):
        direction = torch.randn(embeddings.shape, generator=generator).to(embeddings.device)
        direction *= embeddings.float().norm() / direction.norm()
        moved = [(embeddings.float() + sign * STEP * direction).to(embeddings.dtype) for sign in (1, -1)]
        high, low = (loss_at(model, values, ids).double() for values in moved)
        by_gradient.append((gradient * direction).sum().double())
        measured.append((high - low) / (2 * STEP))
    return torch.stack(by_gradient), torch.stack(measured)


def compare_gradients(model: Any) -> Probe:
    """Compare the gradient that a base passes to its input with that of its dequantised weights.

    Two passes forward and back over 16 tokens, and each quantised layer dequantised once.

    Args:
        model: a quantised base, without an adapter.
    """
    layers, others = quantised_layers(model), other_quantised(model)
    table = model.get_input_embeddings()
    vocab_size = table.weight.shape[0]
    draws = torch.randint(vocab_size, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(SEED))
    ids = draws.to(table.weight.device)
    with evaluating(model):
        embeddings = table(ids).detach()
        found = gradient_at(model, embeddings, ids)
        if others:
            found, reference = slopes(model, embeddings, ids, found)
        else:
            with differentiable(layers):
                reference = gradient_at(model, embeddings, ids)
    found, reference = found.double().flatten(), reference.double().flatten()
    norms = float(found.norm()), float(reference.norm())
    product = norms[0] * norms[1]
    cosine = float(found @ reference) / product if product > 0 and math.isfinite(product) else 0.0
    kind = "finite differences" if others else "dequantised weights"
    return Probe(cosine, norms[0] / norms[1] if norms[1] else 0.0, len(layers), kind)


def check_gradient(model: Any, what: str) -> Probe | None:
    """Refuse a quantised base through which no right gradient passes; None where nothing is quantised.

    Args:
        model: the base, without an adapter.
        what: its form, as the user knows it.

    Raises:
        InputError: naming the cosine.
    """
    if not quantised_layers(model) and not other_quantised(model):
        return None
    try:
        model.train()  # which kernels for inference alone refuse
    except NotImplementedError as error:
        raise InputError(
            f"the base ({what}) can't be trained through ({one_line(error, 200)}): choose another quantisation, for "
            "example --load_in_4bit; see docs/quantised.md"
        ) from error
    finally:
        model.eval()
    figures = compare_gradients(model)
    if not figures.cosine > SMALLEST_COSINE:
        raise InputError(
            f"the base ({what}) passes no right gradient to its input (cosine {figures.cosine:.4f} to "
            f"{figures.reference}, more than {SMALLEST_COSINE} is needed), so nothing could be trained through it: "
            "choose another quantisation, for example --load_in_4bit; see docs/quantised.md"
        )
    return figures
