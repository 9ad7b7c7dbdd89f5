"""Starts of a prefix from within a context: the keys and values that the teacher has there, at some of its tokens.

A prefix of P tokens stands nearer to a conversation than the C tokens of the context. So the context is computed at
positions that end at P instead of C: then every key that is kept has the distance that the teacher's key has (a rotary
embedding knows distances only). With P = C this is the teacher itself. A sliding window counts the kept tokens alone;
there, and where rotations depend on the length, the start is only near to the teacher. Screening compares it with
others.

Dimensions: C tokens of the context, P virtual tokens, S shared keys, t tokens of an example, H query heads, E head
size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from open_instruct.data.packing import to_device
from open_instruct.model.distillation import DistilledModel
from open_instruct.model.shared_prefix import AttentionInputs, Backend

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def is_movable(causal: Any) -> bool:
    """Return whether positions may begin below 0: they are rotations, not rows of a table."""
    return any(name.rsplit(".", 1)[-1] == "rotary_emb" for name, _ in causal.named_modules())


@torch.no_grad()
def received_attention(model: DistilledModel, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Return the attention [C] that each token of the context gets from conversations, summed over layers and heads.

    Args:
        model: active, with one context for all rows.
        batches: of `packing.Packing`.
    """
    device = model.causal.device
    received = torch.zeros(len(model.context_ids), dtype=torch.float64, device=device)
    with model.as_base():
        model.context_prompt(device)  # before anything is recorded
    with recording(model, received):
        for batch in batches:
            row = to_device(batch, device)
            model.teacher_outputs(row["input_ids"], row["position_ids"], row["lengths"], row["target_positions"])
    return received


@contextmanager
def recording(model: DistilledModel, received: torch.Tensor) -> Iterator[None]:
    """Add the attention that the shared keys get to `received` [S] for as long as the context lasts."""
    backend: Backend = model.backend

    def compute(inputs: AttentionInputs) -> torch.Tensor:
        for start, end, num_shared in inputs.segments.spans():
            received.add_(attention_of_shared(inputs, start, end, num_shared))
        return backend(inputs)

    model.backend = compute
    try:
        yield
    finally:
        model.backend = backend


def attention_of_shared(inputs: AttentionInputs, start: int, end: int, num_shared: int) -> torch.Tensor:
    """Return the attention [S] that a segment's queries give to the shared keys, summed over queries and heads."""
    query = inputs.query[0, :, start:end].float()
    key = torch.cat([inputs.shared_key, inputs.key[:, :, start:end]], 2)[0].float()
    scores = query @ key.repeat_interleave(len(query) // len(key), 0).mT * inputs.scale  # [H, t, S + t]
    if inputs.softcap:
        scores = inputs.softcap * (scores / inputs.softcap).tanh()
    places = torch.arange(scores.shape[2], device=scores.device)
    ahead = places[None] - (num_shared + torch.arange(end - start, device=scores.device))[:, None]
    hidden = ahead > 0
    if inputs.window:
        hidden |= ahead <= -inputs.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)[:, :, :num_shared].double().sum((0, 1))


@torch.no_grad()
def keys_values_at(model: DistilledModel, places: Sequence[Sequence[int]]) -> list[Pairs]:
    """Return the teacher's keys and values [1, K, P, E] of each layer, at each choice of P tokens of the context.

    Args:
        model: active, with one context for all rows.
        places: choices of as many positions within the context.
    """
    device = model.causal.device
    with model.as_base():
        pairs, _ = model.context_keys(device, len(places[0]) - len(model.context_ids))
    chosen = [torch.tensor(list(choice), device=device) for choice in places]
    return [[(keys[:, :, index], values[:, :, index]) for keys, values in pairs] for index in chosen]
