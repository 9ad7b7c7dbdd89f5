"""One row, one shared prefix: attention of packed examples that see the virtual tokens and themselves, nothing else.

Causal attention lets nothing after a soft prompt change it, so a micro-batch computes it once: the row is
[P virtual tokens, example 1, example 2, …] without padding. Each example's positions start at P. A soft prompt of
embeddings (prompt tuning, P-tuning) stands at the head of the row; one of keys and values (prefix tuning) is put before
the row's own in every layer. Adapters without virtual tokens have P = 0. A hard prompt, tokens that stand between the
soft prompt and every example, stands at the head of the row, too, behind the virtual tokens.

`transformers` calls `attention` for every layer of a model whose attention implementation is NAME; the row's boundaries
reach it as a keyword argument of the model's forward. The prefix does not travel through a key/value cache, so gradient
checkpointing works with prefix tuning.

Dimensions: T tokens in the row, S shared keys, P virtual tokens, D hidden size, H query heads, K key/value heads, E
head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """The model computes something that packed attention would get wrong; the message names it."""


@dataclass(frozen=True)
class SoftPrompt:
    """The virtual tokens that a method puts before every example.

    Args:
        length: P, the number of virtual tokens.
        embeddings: [P, D], or None.
        keys_values: keys and values [1, K, P, E] of each layer, or None.
        in_decoder: the embeddings stand before the decoder's input, not the encoder's.
        placed: an encoder–decoder's keys and values by place; see `placed_prompts`.
    """

    length: int = 0
    embeddings: torch.Tensor | None = None
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None
    in_decoder: bool = False
    placed: Mapping[str, Sequence[tuple[torch.Tensor, torch.Tensor]]] | None = None


@dataclass(frozen=True)
class Segments:
    """Which positions of a row belong together, for one layer.

    A segment sees the shared keys, which are the first `num_shared` of all keys, and its own. A prefix of keys and
    values comes from outside of the row. The shared keys behind it are those of the row's first positions: virtual
    tokens and hard prompt, which are a segment themselves.

    Args:
        bounds: (start, end) of each segment in the row; the first is the shared tokens' if `num_prefix_tokens` is not
            0.
        num_prefix_tokens: shared tokens that stand in the row: virtual ones that are embeddings, and the hard prompt's.
        num_shared: S, the keys that all examples share.
    """

    bounds: tuple[tuple[int, int], ...]
    num_prefix_tokens: int
    num_shared: int

    @property
    def num_outside(self) -> int:
        """Shared keys that come from outside of the row, the first of all."""
        return self.num_shared - self.num_prefix_tokens

    def spans(self) -> list[tuple[int, int, int]]:
        """Return (start, end, number of shared keys before its own) of each segment.

        Those of the shared tokens' segment are the ones from outside: the others are its own.
        """
        return [
            (start, end, self.num_outside if start < self.num_prefix_tokens else self.num_shared)
            for start, end in self.bounds
        ]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Everything that the attention of one layer over a packed row depends on.

    Args:
        query: [1, H, T, E]
        key: [1, K, T, E]; H is a multiple of K.
        value: [1, K, T, E]
        shared_key: [1, K, S, E], which every example sees before its own.
        shared_value: [1, K, S, E]
        segments: the boundaries of the row; `segments.num_shared` is S.
        scale: factor of the scores.
        window: number of keys that a query sees, itself and the shared ones included; None: all up to itself.
        softcap: c; scores s become c·tanh(s/c); None: they stay as they are.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    shared_key: torch.Tensor
    shared_value: torch.Tensor
    segments: Segments
    scale: float
    window: int | None
    softcap: float | None


Backend = Callable[[AttentionInputs], torch.Tensor]  # returns [1, T, H, E]


@dataclass
class PackedContext:
    """Facts about the packed row in the model, which the attention of every layer needs.

    Args:
        lengths: tokens of each example, in order.
        num_prefix_tokens: shared tokens that stand at the head of the row; see `Segments`.
        keys_values: a prefix of keys and values [1, K, P, E] of each layer, or None.
        backend: computes the attention of one layer.
        layers_seen: indices of the layers whose attention was computed here.
        windows: windows that layers were called with.
        segments_by_num_shared: the boundaries that were made already.
        kept: takes the row's keys and values [1, K, T, E] of each layer, which a later row can have as its prefix;
            None: they are not kept.
    """

    lengths: tuple[int, ...]
    num_prefix_tokens: int
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    backend: Backend
    layers_seen: set[int] = field(default_factory=set)
    windows: set[int] = field(default_factory=set)
    segments_by_num_shared: dict[int, Segments] = field(default_factory=dict)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None

    def segments(self, num_shared: int) -> Segments:
        """Return the boundaries for layers with `num_shared` shared keys; made once for all of them."""
        if num_shared not in self.segments_by_num_shared:
            bounds = [(0, self.num_prefix_tokens)] if self.num_prefix_tokens else []
            start = self.num_prefix_tokens
            for length in self.lengths:
                bounds.append((start, start + length))
                start += length
            self.segments_by_num_shared[num_shared] = Segments(tuple(bounds), self.num_prefix_tokens, num_shared)
        return self.segments_by_num_shared[num_shared]


def unknown_arguments(others: dict[str, Any]) -> list[str]:
    """Return the names of a model's further arguments that may say something about the scores."""
    return sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)


@torch.compiler.disable
def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_context: PackedContext | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer over a packed row, as `transformers` calls it.

    Args:
        module: the layer's attention; `layer_idx` names the layer.
        query: [1, H, T, E]
        key: [1, K, T, E]; H is a multiple of K.
        value: [1, K, T, E]
        attention_mask: None, because the boundaries are in `packed_context`.
        packed_context: boundaries and prefix of the row.
        scaling: factor of the scores; None: 1/√E.
        sliding_window: positions that a query sees, its own and the virtual tokens included; None: all before it.
        softcap: scores s become c·tanh(s/c) (Gemma 2).
        dropout: must be 0.
        others: further arguments of the model; those that are not known to be harmless are refused.

    Returns:
        [1, T, H, E], and None instead of the attention weights.

    Raises:
        CannotPack: the layer uses something that is not computed here.
    """
    if packed_context is None:
        raise CannotPack("its attention loses the row's boundaries on the way to the layers")
    unknown = unknown_arguments(others)
    if unknown or dropout or others.get("is_causal") is False:
        raise CannotPack(f"its attention uses {', '.join(unknown) or ('dropout' if dropout else 'no causal order')}")
    packed_context.layers_seen.add(module.layer_idx)
    if sliding_window:
        packed_context.windows.add(sliding_window)
    query, key = query.to(value), key.to(value)  # under autocast, rotation leaves them in float32
    if packed_context.kept is not None:
        packed_context.kept[module.layer_idx] = key, value
    num_in_row = packed_context.num_prefix_tokens
    shared_key, shared_value = key[:, :, :num_in_row], value[:, :, :num_in_row]
    if packed_context.keys_values is not None:
        outside = [tensor.to(key) for tensor in packed_context.keys_values[module.layer_idx]]
        own = (shared_key, shared_value)
        shared_key, shared_value = (
            torch.cat(pair, 2) if num_in_row else pair[0] for pair in zip(outside, own, strict=True)
        )
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        shared_key=shared_key,
        shared_value=shared_value,
        segments=packed_context.segments(shared_key.shape[2]),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
    )
    with torch.autocast(query.device.type, enabled=False):
        return packed_context.backend(inputs), None


AttentionInterface.register(NAME, attention)
# A name without a mask function gets no mask either, but transformers logs a warning.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
