"""One row, one shared prefix: attention of packed examples that see the virtual tokens and themselves, nothing else.

Causal attention lets nothing after a soft prompt change it, so a micro-batch computes it once: the row is
[P virtual tokens, example 1, example 2, …] without padding. Each example's positions start at P. A soft prompt of
embeddings (prompt tuning, P-tuning) stands at the head of the row; one of keys and values (prefix tuning) is put before
the row's own in every layer. Adapters without virtual tokens have P = 0.

`transformers` calls `attention` for every layer of a model whose attention implementation is NAME; the row's boundaries
reach it as a keyword argument of the model's forward. The prefix does not travel through a key/value cache, so gradient
checkpointing works with prefix tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "shared_prefix"
# Keyword arguments that transformers passes along and that say nothing about the scores.
HARMLESS = {
    "position_ids",
    "use_cache",
    "cache_position",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
}


class CannotPack(Exception):
    """The model computes something that packed attention would get wrong; the message says what."""


@dataclass(frozen=True)
class SoftPrompt:
    """What a method puts before every example: embeddings [P, D], or keys and values [1, K, P, E] of each layer. `length` is P."""

    length: int = 0
    embeddings: torch.Tensor | None = None
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None


@dataclass(frozen=True)
class Segments:
    """Which positions of a row belong together, for one layer.

    The keys that a segment sees are the first `num_shared` of all, and its own. With a prefix of embeddings the shared
    ones are the row's own first positions, which are a segment, too; with one of keys and values they come from outside.

    Args:
        bounds: (start, end) of each segment in the row; the first is the virtual tokens' where `num_head` is not 0.
        num_head: virtual tokens that stand in the row.
        num_shared: keys that all examples share.
    """

    bounds: tuple[tuple[int, int], ...]
    num_head: int
    num_shared: int

    def spans(self) -> list[tuple[int, int, int]]:
        """(start, end, number of shared keys before its own) of each segment."""
        return [(start, end, 0 if start < self.num_head else self.num_shared) for start, end in self.bounds]


Backend = Callable[..., torch.Tensor]


@dataclass
class Row:
    """A packed row on its way through the model.

    Args:
        lengths: tokens of each example, in order.
        num_head: virtual tokens that stand at the row's head, P or 0.
        prefix: keys and values [1, K, P, E] of each layer, or None.
        backend: computes the attention of one layer.
    """

    lengths: tuple[int, ...]
    num_head: int
    prefix: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    backend: Backend
    layers_seen: set[int] = field(default_factory=set)
    by_shared: dict[int, Segments] = field(default_factory=dict)

    def segments(self, num_shared: int) -> Segments:
        """The boundaries, made once for all layers with so many shared keys."""
        if num_shared not in self.by_shared:
            bounds = [(0, self.num_head)] if self.num_head else []
            at = self.num_head
            for length in self.lengths:
                bounds.append((at, at + length))
                at += length
            self.by_shared[num_shared] = Segments(tuple(bounds), self.num_head, num_shared)
        return self.by_shared[num_shared]


@torch.compiler.disable
def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row: Row | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over a packed row, as `transformers` calls it.

    Args:
        module: the layer's attention; `layer_idx` names the layer.
        query: [1, H, T, E]
        key: [1, K, T, E]; H is a multiple of K.
        value: [1, K, T, E]
        attention_mask: None: boundaries are in `row`.
        row: boundaries and prefix.
        scaling: of the scores; None: 1/√E.
        sliding_window: positions that a query sees, its own and the virtual tokens included; None: all before it.
        softcap: scores s become c·tanh(s/c) (Gemma 2).
        dropout: must be 0.
        others: anything else that the model wants; what is not known to be harmless is refused.

    Returns:
        [1, T, H, E], None

    Raises:
        CannotPack: the layer uses something that is not computed here.
    """
    if row is None:
        raise CannotPack("its attention loses the row's boundaries on the way to the layers")
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if unknown or dropout or others.get("is_causal") is False:
        raise CannotPack(f"its attention uses {', '.join(unknown) or ('dropout' if dropout else 'no causal order')}")
    row.layers_seen.add(module.layer_idx)
    query, key = query.to(value), key.to(value)  # under autocast, rotation leaves them in float32
    if row.prefix is None:
        shared_key, shared_value = key[:, :, : row.num_head], value[:, :, : row.num_head]
    else:
        shared_key, shared_value = (tensor.to(key) for tensor in row.prefix[module.layer_idx])
    segments = row.segments(shared_key.shape[2])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        return row.backend(query, key, value, shared_key, shared_value, segments, scale, sliding_window, softcap), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(
    NAME, lambda *args, **kwargs: None
)  # unregistered names get no mask either, but log a warning
