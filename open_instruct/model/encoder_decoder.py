"""Encoder–decoders: several pairs in one encoder row and one decoder row, and the padded reference.

A soft prompt of embeddings depends on its source, as an encoder attends both ways and a decoder reads the source: it
stands before each example. A prefix of keys and values is shared by all. T5 adds a bias that knows only the distance
of two tokens: made for the whole row, its block for one segment is that segment's own. Before a prefix it is computed
from the same table. BART adds positions by the index in the row: its embeddings get the difference beforehand.

Dimensions: S tokens of the sources' row, T of the targets' row, P virtual tokens, D hidden size, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from open_instruct.data.packing import IGNORE
from open_instruct.data.pairs import bounds_of
from open_instruct.errors import InputError
from open_instruct.model.chunked_loss import Head
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.pair_attention import NAME, PackedPairs, kinds_of, tables_of
from open_instruct.model.placed_prompts import prefixes_by_layer
from open_instruct.model.shared_prefix import CannotPack, SoftPrompt
from open_instruct.model.training_model import PackedModel, TrainingModel


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
        before_source, before_target = (None, prompt.embeddings) if prompt.in_decoder else (prompt.embeddings, None)
        sources, read = [source for source, _ in lengths], [target for _, target in lengths]
        virtual_sources, virtual_targets = (0 if part is None else len(part) for part in (before_source, before_target))
        row = PackedPairs(
            bounds_of([source + virtual_sources for source in sources]),
            bounds_of([target + virtual_targets for target in read]),
            self.kinds,
            self.tables,
            prompt.keys_values,
            prefixes_by_layer(self.kinds, prompt.placed or {}),
        )
        encoder, decoder = self.causal.get_encoder(), self.causal.get_decoder()
        states = encoder(
            **stack_inputs(encoder, input_ids, sources, prompt=before_source), packed_pairs=row
        ).last_hidden_state
        first = prompt.length if prompt.keys_values is not None else 0
        segment = torch.repeat_interleave(torch.arange(1, len(read) + 1), torch.tensor(read)).to(target_positions)
        hidden = decoder(
            **stack_inputs(decoder, decoder_input_ids, read, first, before_target),
            encoder_hidden_states=states,
            packed_pairs=row,
            use_cache=False,
        ).last_hidden_state[0, target_positions + virtual_targets * segment[target_positions]]
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


def stack_inputs(
    stack: Any, ids: torch.Tensor, lengths: Sequence[int], first: int = 0, prompt: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return a stack's input: ids as they are, or embeddings where virtual tokens or positions are added.

    Args:
        stack: encoder or decoder.
        ids: [1, T]
        lengths: of the segments.
        first: position of each segment's first token: that after a prefix.
        prompt: a soft prompt [P, D] that stands before each segment, or None.
    """
    num_virtual = 0 if prompt is None else len(prompt)
    positions = positions_of([num_virtual + length for length in lengths], first, ids.device)
    told = told_positions(stack, positions)
    if prompt is None and position_table(stack) is None:
        return {"input_ids": ids, **told}
    embedded = stack.get_input_embeddings()(ids)[0]
    if prompt is not None:
        before = prompt.to(embedded.dtype)
        embedded = torch.cat([part for piece in embedded.split(list(lengths)) for part in (before, piece)])
    return {"inputs_embeds": moved(stack, embedded[None], positions), **told}


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
