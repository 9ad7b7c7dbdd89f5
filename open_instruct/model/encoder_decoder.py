"""Encoder–decoders: several pairs in one encoder row and one decoder row, and the padded reference.

An encoder attends both ways, so a soft prompt of embeddings depends on its source and stands before each of them. A
prefix of keys and values in the decoder's self-attention is shared by all. T5 adds a bias that knows only the distance
of two tokens: made for the whole row, its block for one segment is that segment's own. Before a prefix it is computed
from the same table. BART adds positions by the index in the row: its embeddings get the difference beforehand.

Dimensions: S tokens of the sources' row, T of the targets' row, P virtual tokens, D hidden size, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from open_instruct.data.packing import IGNORE
from open_instruct.data.pairs import bounds_of
from open_instruct.errors import InputError
from open_instruct.model.attention_masks import visible_keys
from open_instruct.model.chunked_loss import Head
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.shared_prefix import HARMLESS, CannotPack, SoftPrompt
from open_instruct.model.training_model import PackedModel, TrainingModel

NAME = "packed_pairs"


@dataclass
class PackedPairs:
    """Facts about the packed rows, which the attention of every layer needs.

    Args:
        sources: tokens of each segment of the encoder's row, virtual ones included.
        targets: tokens of each segment of the decoder's row.
        kinds: "encoder", "decoder" or "cross" of each attention; see `kinds_of`.
        biases: the attention that holds the table of distances, for each of the decoder's own; see `tables_of`.
        keys_values: a prefix [1, H, P, E] for the decoder's self-attention in each layer, or None.
    """

    sources: Sequence[tuple[int, int]]
    targets: Sequence[tuple[int, int]]
    kinds: dict[nn.Module, str]
    biases: dict[nn.Module, nn.Module] = field(default_factory=dict)
    keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None


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
    unknown = sorted(name for name, given in others.items() if given is not None and name not in HARMLESS)
    if unknown:
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
        outputs.append(attend(query[:, :, start:end], own_key, own_value, bias, dropout, scaling, softcap))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


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


def decoder_start_of(config: Any) -> int:
    """Return the token from which a decoder predicts a target's first: T5Gemma takes its decoder's first token.

    Raises:
        InputError: the configuration names none.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        start = getattr(getattr(config, "decoder", None), "bos_token_id", None)
    if start is None:
        raise InputError("the model's config.json names no decoder_start_token_id: add it")
    return int(start)


def pair_head_forms(causal: Any) -> dict[str, Head]:
    """Return the known functions from the decoder's last hidden state [n, D] to the logits [n, V], by name."""
    linear, bias = causal.get_output_embeddings(), getattr(causal, "final_logits_bias", None)
    scale = getattr(causal.config, "d_model", 1) ** -0.5
    forms: dict[str, Head] = {"linear": lambda x: linear(x), "scaled": lambda x: linear(x * scale)}
    if bias is not None:
        forms["biased"] = lambda x: linear(x) + bias[0]
    softcap = getattr(causal.get_decoder().config, "final_logit_softcapping", None)
    if softcap:
        forms["softcapped"] = lambda x: softcap * torch.tanh(linear(x) / softcap)
    return forms


def find_pair_head(causal: Any) -> str | None:
    """Return the name of the form that gives the model's own logits, or None if none does."""
    ids = torch.arange(4, device=causal.device)[None]
    with evaluating(causal), torch.no_grad():
        states = causal.get_encoder()(input_ids=ids).last_hidden_state
        hidden = causal.get_decoder()(input_ids=ids, encoder_hidden_states=states, use_cache=False).last_hidden_state
        expected = causal(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits.float()
        errors = {name: (form(hidden).float() - expected).abs().max() for name, form in pair_head_forms(causal).items()}
    nearest = min(errors, key=lambda name: float(errors[name]))
    return nearest if errors[nearest] <= 1e-2 * expected.abs().max() else None


class PackedPairModel(PackedModel):
    """An encoder–decoder on packed pairs; see `PackedModel`."""

    attention_name = NAME

    def __init__(self, model: Any, soft_prompt: Any, backend: Any, head: str | None = "find") -> None:
        """Wrap a model; see `PackedModel`.

        Raises:
            CannotPack: see `kinds_of`.
        """
        super().__init__(model, soft_prompt, backend, head)
        self.kinds = kinds_of(self.causal)
        self.tables = tables_of(self.kinds)

    def find_head(self) -> str | None:
        """See `PackedModel`."""
        return find_pair_head(self.causal)

    def head_forms(self) -> dict[str, Head]:
        """See `PackedModel`."""
        return pair_head_forms(self.causal)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        lengths: tuple[tuple[int, int], ...],
        target_positions: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch of `pairs.PairPacking`, and the number of its labelled tokens.

        Args:
            input_ids: [1, S], without virtual tokens.
            decoder_input_ids: [1, T]
            lengths: tokens of each source and target.
            target_positions: [N], indices into the decoder's row.
            targets: [N], the labelled tokens.

        Raises:
            RuntimeError: the model is not active.
            CannotPack: the model computes something that packed attention would get wrong.
        """
        if self._own_attention is None:
            raise RuntimeError(
                "this PackedPairModel is not active: call activate() first, or use it in a with statement"
            )
        prompt = self.soft_prompt() or SoftPrompt()
        in_encoder = prompt.length if prompt.embeddings is not None else 0
        sources, read = [source for source, _ in lengths], [target for _, target in lengths]
        row = PackedPairs(
            bounds_of([source + in_encoder for source in sources]),
            bounds_of(read),
            self.kinds,
            self.tables,
            prompt.keys_values,
        )
        encoder, decoder = self.causal.get_encoder(), self.causal.get_decoder()
        embedded = encoder_inputs(encoder, input_ids, sources, prompt.embeddings)
        states = encoder(**embedded, packed_pairs=row).last_hidden_state
        in_decoder = prompt.length if prompt.keys_values is not None else 0
        hidden = decoder(
            **decoder_inputs(decoder, decoder_input_ids, read, in_decoder),
            encoder_hidden_states=states,
            packed_pairs=row,
            use_cache=False,
        ).last_hidden_state[0, target_positions]
        if self.head is None:
            raise CannotPack("its logits are no known function of the decoder's states")
        return self.loss(hidden, targets), torch.tensor(len(targets), device=targets.device)


def position_table(stack: Any) -> tuple[torch.Tensor, int] | None:
    """Return the learned positions [rows, D] that a stack adds by index, and the row of position 0; None without."""
    table = getattr(stack, "embed_positions", None)
    weight = getattr(table, "weight", None)
    return None if weight is None else (weight, int(getattr(table, "offset", 0)))


def moved(stack: Any, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return embeddings [1, T, D] with the difference between positions [T] and those that the stack adds by index."""
    found = position_table(stack)
    if found is None:
        return embedded
    weight, offset = found
    index = torch.arange(len(positions), device=positions.device)
    if len(index) + offset > len(weight):
        raise InputError(
            f"rows of this model have at most {len(weight) - offset} positions, and this one has {len(index)}: lower "
            "--max_tokens_per_microbatch, or use --packing False"
        )
    return embedded + (weight[positions + offset] - weight[index + offset])[None].to(embedded.dtype)


def positions_of(lengths: Sequence[int], first: int, device: torch.device) -> torch.Tensor:
    """Return positions [T] that count from `first` in each segment."""
    return torch.cat([torch.arange(first, first + length, device=device) for length in lengths])


def told_positions(stack: Any, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the argument by which a stack is told its rows' positions [T]; empty where it has none."""
    return {"position_ids": positions[None]} if "position_ids" in signature(stack.forward).parameters else {}


def encoder_inputs(
    encoder: Any, ids: torch.Tensor, lengths: Sequence[int], prompt: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the encoder's input: ids as they are, or embeddings with a soft prompt [P, D] before each source."""
    num_virtual = 0 if prompt is None else len(prompt)
    positions = positions_of([num_virtual + length for length in lengths], 0, ids.device)
    told = told_positions(encoder, positions)
    if prompt is None and position_table(encoder) is None:
        return {"input_ids": ids, **told}
    embedded = encoder.get_input_embeddings()(ids)[0]
    pieces = list(embedded.split(list(lengths)))
    if prompt is not None:
        pieces = [torch.cat([prompt.to(embedded.dtype), piece]) for piece in pieces]
    return {"inputs_embeds": moved(encoder, torch.cat(pieces)[None], positions), **told}


def decoder_inputs(decoder: Any, ids: torch.Tensor, lengths: Sequence[int], first: int) -> dict[str, torch.Tensor]:
    """Return the decoder's input: ids as they are, or embeddings where positions are added by index.

    Args:
        decoder: the stack.
        ids: [1, T]
        lengths: of the segments.
        first: position of each segment's first token: that after the prefix.
    """
    positions = positions_of(lengths, first, ids.device)
    told = told_positions(decoder, positions)
    if position_table(decoder) is None:
        return {"input_ids": ids, **told}
    return {"inputs_embeds": moved(decoder, decoder.get_input_embeddings()(ids), positions), **told}


class PaddedPairModel(TrainingModel):
    """PEFT's own forward on right-padded pairs: the reference, and the way for models that can't be packed."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        labels: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a batch of `pairs.PairPadding`, and the number of its labelled tokens.

        Args:
            input_ids: [B, S]
            attention_mask: [B, S], 1 on real tokens.
            decoder_input_ids: [B, T]
            labels: [B, T], IGNORE where nothing is learned.
        """
        logits = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids, use_cache=False
        ).logits
        labelled = labels != IGNORE
        return F.cross_entropy(logits[labelled].float(), labels[labelled], reduction="sum"), labelled.sum()
