"""Attention of packed pairs: each decoder segment sees its own source and itself, and a prefix where there is one.

T5 adds a bias that knows only the distance of two tokens: made for the whole row, its block for one segment is that
segment's own. Before a prefix it is computed from the same table.

Dimensions: S tokens of the sources' row, T of the targets' row, P virtual tokens, H heads, K key/value heads, E head
size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from open_instruct.model.attention_masks import visible_keys
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.shared_prefix import CannotPack, unknown_arguments

NAME = "packed_pairs"
PLACED = "placed_prefix"  # attention of unpacked rows whose prefix is that of `placed_prompts`
Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values [1, K, P, E]


@dataclass
class PackedPairs:
    """Facts about the packed rows, which the attention of every layer needs.

    Args:
        sources: tokens of each segment of the encoder's row, virtual ones included.
        targets: tokens of each segment of the decoder's row.
        kinds: "encoder", "decoder" or "cross" of each attention; see `kinds_of`.
        biases: the attention that holds the table of distances, for each of the decoder's own; see `tables_of`.
        keys_values: a prefix [1, H, P, E] for the decoder's self-attention in each layer, or None.
        placed: prefixes that any attention may have, at no distance; see `placed_prompts`.
    """

    sources: Sequence[tuple[int, int]]
    targets: Sequence[tuple[int, int]]
    kinds: dict[nn.Module, str]
    biases: dict[nn.Module, nn.Module] = field(default_factory=dict)
    keys_values: Sequence[Pair] | None = None
    placed: Mapping[nn.Module, Pair] = field(default_factory=dict)


@torch.compiler.disable
def pair_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed_pairs: PackedPairs | None = None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer over packed rows, as `transformers` calls it.

    Args:
        module: the layer's attention.
        query: [1, H, T, E], or S in place of T in the encoder.
        key: [1, K, T, E], or S in place of T in the encoder and across; H is a multiple of K.
        value: as `key`.
        attention_mask: None, because the boundaries are in `packed_pairs`.
        packed_pairs: boundaries and prefix of the rows.
        scaling: factor of the scores; None: 1/√E.
        position_bias: what is added to the scores, [1, H, T, T] for the whole row.
        sliding_window: how far a query sees (T5Gemma); see `hidden_keys`.
        softcap: scores s become c·tanh(s/c) before the bias is added (T5Gemma).
        dropout: of the attention's weights.
        others: further arguments of the model; those that are not known to be harmless are refused.

    Returns:
        [1, T, H, E], and None instead of the attention weights.

    Raises:
        CannotPack: the layer uses something that is not computed here.
    """
    if packed_pairs is None:
        raise CannotPack("its attention loses the rows' boundaries on the way to the layers")
    if unknown := unknown_arguments(others):
        raise CannotPack(f"its attention uses {', '.join(unknown)}")
    query, key = query.to(value), key.to(value)
    kind = packed_pairs.kinds.get(module)
    if kind is None:
        raise CannotPack(f"its attention {type(module).__name__} is of no known kind")
    queries = packed_pairs.sources if kind == "encoder" else packed_pairs.targets
    keys = packed_pairs.targets if kind == "decoder" else packed_pairs.sources
    prefix = packed_pairs.keys_values[module.layer_idx] if kind == "decoder" and packed_pairs.keys_values else None
    outputs = []
    for (start, end), (first, last) in zip(queries, keys, strict=True):
        own_key, own_value, bias = key[:, :, first:last], value[:, :, first:last], None
        if position_bias is not None and kind != "cross":  # across, it is zero
            bias = position_bias[:, :, start:end, first:last].to(value)
        if prefix is not None:
            own_key = torch.cat([prefix[0].to(key), own_key], 2)
            own_value = torch.cat([prefix[1].to(value), own_value], 2)
            before = prefix_bias(packed_pairs.biases.get(module), prefix[0].shape[2], end - start, value)
            bias = value.new_zeros(1, 1, end - start, last - first) if bias is None else bias
            bias = torch.cat([before.expand(1, bias.shape[1], -1, -1), bias], 3)
        hidden = hidden_keys(kind, end - start, own_key.shape[2], sliding_window, value.device)
        if hidden is not None:
            bias = value.new_zeros(1, 1, *hidden.shape) if bias is None else bias
            bias = bias.masked_fill(hidden, -torch.inf)
        own_key, own_value, bias = behind(packed_pairs.placed.get(module), own_key, own_value, bias)
        outputs.append(attend(query[:, :, start:end], own_key, own_value, bias, dropout, scaling, softcap))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


@torch.compiler.disable
def placed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer behind the prefix in its `placed_prefix`, as `transformers` calls it.

    Args:
        module: the layer's attention; a dict in its `seen_keys_values` gets this call's keys and values.
        query: [B, H, T, E]
        key: [B, K, S, E]; H is a multiple of K.
        value: as `key`.
        attention_mask: what is added to the scores, [B, 1, T, S] with the window; None: all is visible.
        scaling: factor of the scores; None: 1/√E.
        position_bias: what is added to the scores as well, [1 or B, H, T, S].
        sliding_window: is in `attention_mask`.
        softcap: scores s become c·tanh(s/c) before the bias is added.
        dropout: of the attention's weights.
        others: further arguments of the model; those that are not known to be harmless are refused.

    Returns:
        [B, T, H, E], and None instead of the attention weights.

    Raises:
        CannotPack: the layer uses something that is not computed here.
    """
    if unknown := unknown_arguments(others):
        raise CannotPack(f"its attention uses {', '.join(unknown)}")
    query, key = query.to(value), key.to(value)
    if (seen := getattr(module, "seen_keys_values", None)) is not None:
        seen[module] = key, value
    bias = None if attention_mask is None else attention_mask[..., : key.shape[2]].to(value)
    if position_bias is not None:
        bias = position_bias.to(value) if bias is None else bias + position_bias.to(value)
    key, value, bias = behind(getattr(module, "placed_prefix", None), key, value, bias)
    return attend(query, key, value, bias, dropout, scaling, softcap).transpose(1, 2).contiguous(), None


def behind(
    prefix: Pair | None, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return keys and values [B, K, P + S, E] behind a prefix that every query sees, and the bias of their scores."""
    if prefix is None:
        return key, value, bias
    before = [part.to(value).expand(len(key), -1, -1, -1) for part in prefix]
    bias = None if bias is None else F.pad(bias, (before[0].shape[2], 0))
    return torch.cat([before[0], key], 2), torch.cat([before[1], value], 2), bias


def hidden_keys(
    kind: str, num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return which keys [num_queries, num_keys] a query does not see, or None if it sees all; queries are the last.

    In the decoder a query sees itself and what precedes it, `window` keys in all. In the encoder it sees what is at
    most `window` away on either side (`transformers.masking_utils.sliding_window_bidirectional_overlay`).
    """
    if kind == "decoder":
        return ~visible_keys(num_queries, num_keys, window, device)
    if kind == "cross" or not window or num_keys <= window + 1:
        return None
    places = torch.arange(num_keys, device=device)
    return (places[num_keys - num_queries :, None] - places[None]).abs() > window


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention [1, H, T, E] of one segment.

    Args:
        query: [1, H, T, E]
        key: [1, K, S, E]; H is a multiple of K.
        value: [1, K, S, E]
        bias: what is added to the scores, or None.
        dropout: of the weights.
        scale: factor of the scores; None: 1/√E.
        softcap: c; scores s become c·tanh(s/c) before the bias is added; None: they stay as they are.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    weights = (scores if bias is None else scores + bias).float().softmax(-1).to(value)
    return F.dropout(weights, dropout) @ value


def prefix_bias(table: Any, length: int, num_queries: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bias [1, H or 1, t, P] of t queries, the first at position P, against a prefix of P keys.

    Args:
        table: the attention that holds the stack's table of distances; None: the model has none.
        length: P
        num_queries: t
        like: gives type and device.
    """
    if table is None:
        return torch.zeros(1, 1, num_queries, length, dtype=like.dtype, device=like.device)
    bias = table.compute_bias(num_queries, length + num_queries, device=like.device, past_seen_tokens=length)
    before: torch.Tensor = bias[..., :length].to(like)
    return before


AttentionInterface.register(NAME, pair_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
AttentionInterface.register(PLACED, placed_attention)
AttentionMaskInterface.register(PLACED, eager_mask)


def kinds_of(model: Any) -> dict[nn.Module, str]:
    """Return which of a model's attentions are the encoder's, the decoder's, and across, by what reaches them.

    Raises:
        CannotPack: one of them joins keys of both stacks, or does not go through transformers' AttentionInterface.
    """
    kinds: dict[nn.Module, str] = {}
    names = {(5, 5): "encoder", (3, 3): "decoder", (3, 5): "cross"}

    def record(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **others: Any
    ) -> Any:
        sizes = query.shape[2], key.shape[2]
        if sizes not in names:
            raise CannotPack("its decoder attends to both stacks at once")
        kinds[module] = names[sizes]
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register(f"{NAME}_record", record)
    AttentionMaskInterface.register(f"{NAME}_record", lambda *args, **kwargs: None)
    own, device = model.config._attn_implementation, model.device
    model.set_attn_implementation(f"{NAME}_record")
    try:
        with torch.no_grad(), evaluating(model):
            model(
                input_ids=torch.zeros(1, 5, dtype=torch.long, device=device),
                decoder_input_ids=torch.zeros(1, 3, dtype=torch.long, device=device),
                use_cache=False,
            )
    finally:
        model.set_attn_implementation(own)
    if set(kinds.values()) != set(names.values()):
        raise CannotPack("its attention does not go through transformers' AttentionInterface")
    return kinds


def tables_of(kinds: dict[nn.Module, str]) -> dict[nn.Module, nn.Module]:
    """Return for each of the decoder's self-attentions the one that holds its table of distances, if there is any.

    In T5 that is the first layer's for all; in umT5 each has its own.
    """
    tables: dict[nn.Module, nn.Module] = {}
    last: nn.Module | None = None
    for module, kind in kinds.items():
        if kind == "decoder":
            last = module if getattr(module, "has_relative_attention_bias", False) else last
            if last is not None:
                tables[module] = last
    return tables
