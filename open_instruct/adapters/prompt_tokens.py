"""Soft prompts as vocabulary entries, so that a plain checkpoint holds them and engines can serve them.

A soft prompt of embeddings is P vectors before the input's. They become rows of the embedding matrix, the rows of P
new tokens, which the tokenizer writes before everything else. The hidden states are then the same, with no PEFT at
inference. The head gets rows of zeros, so the new tokens are hardly ever predicted, and `generation_config` suppresses
them. The tokens of a prefix of keys and values are placeholders with rows of zeros; see `open_instruct.serving`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.folders import BASE
from open_instruct.data.pairs import BEFORE_SOURCES
from open_instruct.errors import InputError

A, B = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}}
BIAS_OF_NEW_TOKENS = -1e4  # where the head has one: no probability at all


@dataclass(frozen=True)
class NewTokens:
    """The tokens that stand for one adapter's soft prompt, in order."""

    adapter: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    is_prefix: bool = False  # placeholders of keys and values, which only `open_instruct.serving` can serve

    @property
    def text(self) -> str:
        """The text that the tokenizer reads as these tokens."""
        return "".join(self.tokens)


def add_tokens(tokenizer: PreTrainedTokenizerBase, adapter: str, num_tokens: int, is_prefix: bool = False) -> NewTokens:
    """Give the tokenizer `num_tokens` special tokens, `<|ADAPTER_0|>` and so on, and return them.

    Raises:
        InputError: it has one of them already.
    """
    tokens = tuple(f"<|{adapter}_{number}|>" for number in range(num_tokens))
    known = tokenizer.get_vocab()
    clash = next((token for token in tokens if token in known), None)
    if clash:
        raise InputError(
            f"the tokenizer has a token {clash} already: give the adapter another name, --adapter NAME=DIR"
        )
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return NewTokens(adapter, tokens, tuple(tokenizer.convert_tokens_to_ids(list(tokens))), is_prefix)


def rows_with(old_rows: int, prompts: Sequence[tuple[NewTokens, torch.Tensor]]) -> int:
    """Return how many rows an embedding matrix gets, which stay a multiple of what they were one of."""
    highest = max(max(new.ids) for new, _ in prompts)
    multiple = math.gcd(old_rows, 128)
    return max(old_rows, math.ceil((highest + 1) / multiple) * multiple)


@torch.no_grad()
def grow(model: Any, prompts: Sequence[tuple[NewTokens, torch.Tensor]]) -> None:
    """Write soft prompts into the embedding matrix, untie the head, and keep both at the multiple that they had.

    Args:
        model: a causal language model; changed in place.
        prompts: new tokens with their vectors [P, D], in the scale that the decoder receives.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    old_rows = embedding.weight.shape[0]
    num_rows = rows_with(old_rows, prompts)
    scale = embedding_scale(embedding)
    weight = torch.cat([embedding.weight, embedding.weight.new_zeros(num_rows - old_rows, embedding.weight.shape[1])])
    for new, vectors in prompts:
        weight[list(new.ids)] = (vectors.float().to(weight.device) / scale).to(weight.dtype)
    head_weight = torch.cat([head.weight, head.weight.new_zeros(num_rows - old_rows, head.weight.shape[1])]).clone()
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    embedding.num_embeddings = num_rows
    head.weight = nn.Parameter(head_weight, requires_grad=False)
    head.out_features = num_rows
    if getattr(head, "bias", None) is not None:
        more = head.bias.new_full((num_rows - old_rows,), BIAS_OF_NEW_TOKENS)
        head.bias = nn.Parameter(torch.cat([head.bias, more]), requires_grad=False)
    model.config.tie_word_embeddings = False
    text = model.config.get_text_config()
    text.tie_word_embeddings, text.vocab_size = False, num_rows
    model.vocab_size = num_rows
    suppress(model, prompts, old_rows)


def suppress(model: Any, prompts: Sequence[tuple[NewTokens, torch.Tensor]], old_rows: int) -> None:
    """Let generation never choose a new token, or a row that only fills up the multiple and stands for nothing."""
    num_rows = model.get_input_embeddings().weight.shape[0]
    ids = [*(token for new, _ in prompts for token in new.ids), *range(old_rows, num_rows)]
    model.generation_config.suppress_tokens = sorted({*(model.generation_config.suppress_tokens or []), *ids})


@torch.no_grad()
def grow_encoder(model: Any, prompt: tuple[NewTokens, torch.Tensor]) -> None:
    """Write a soft prompt into the encoder's embedding matrix; the head gets rows that are hardly ever predicted.

    Where the head is the embedding matrix (T5), it becomes a matrix of its own, T5's factor included. Where its logits
    get a bias (BART), that excludes the new tokens.

    Args:
        model: an encoder–decoder; changed in place.
        prompt: new tokens with their vectors [P, D], in the scale that the encoder receives.
    """
    new, vectors = prompt
    old_rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows_with(old_rows, [prompt]), mean_resizing=False)
    for config in (model.config, model.get_encoder().config, model.get_decoder().config):  # T5Gemma has three
        config.vocab_size = model.get_input_embeddings().weight.shape[0]
    embedding, head = model.get_encoder().get_input_embeddings(), model.get_output_embeddings()
    own_head = head.weight.clone()
    embedding.weight[list(new.ids)] = (vectors.float().to(embedding.weight.device) / embedding_scale(embedding)).to(
        embedding.weight.dtype
    )
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias[:, old_rows:] = BIAS_OF_NEW_TOKENS
    else:
        own_head[old_rows:] = 0
        if getattr(model.config, "scale_decoder_outputs", False):
            own_head *= model.config.d_model**-0.5
            model.config.scale_decoder_outputs = False
        head.weight = nn.Parameter(own_head, requires_grad=False)
        model.config.tie_word_embeddings = False
    suppress(model, [prompt], old_rows)


def put_before_sources(tokenizer: PreTrainedTokenizerBase, new: NewTokens) -> None:
    """Make an encoder–decoder's tokenizer write new tokens before each text, and remember it: targets go without."""
    put_first(tokenizer, [new], {new.adapter: None})
    tokenizer.init_kwargs[BEFORE_SOURCES] = len(new.ids)


def embedding_scale(embedding: nn.Module) -> float:
    """Return the factor by which the embedding module multiplies its rows: 1 for most, sqrt(D) for Gemma 3.

    A row of the matrix is multiplied by it, a soft prompt is not.
    """
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    ids = torch.arange(min(64, len(weight)), device=weight.device)
    output, rows = embedding(ids).float(), weight[ids].float()
    return (output.norm() / rows.norm()).item() if not torch.equal(output, rows) else 1.0


def put_first(tokenizer: PreTrainedTokenizerBase, sets: Sequence[NewTokens], templates: dict[str, str | None]) -> None:
    """Make the tokenizer write an adapter's tokens before everything else: in chats, and before plain text.

    A chat chooses its adapter by `chat_template_kwargs={"adapter": NAME}`, where "base" is the plain model. Chats that
    choose none get the first adapter's tokens, and plain text those of the first that is no prefix. A chat with a
    prefix is an error unless the server says, by `prefixes_served`, that it has the prefix's keys and values: any other
    server would answer from placeholders.

    Args:
        tokenizer: changed in place.
        sets: tokens of each adapter.
        templates: each adapter's chat template; None where it has none.
    """
    first = sets[0]
    if before_text := before_plain_text(sets):
        backend = tokenizer._tokenizer  # transformers has no public way to a post-processor
        own = json.loads(backend.to_str())["post_processor"]
        backend.post_processor = Tokenizer.from_str(
            json.dumps(EMPTY | {"post_processor": post_processor(own, before_text)})
        ).post_processor
    bodies = {new.adapter: without_generation_marks(templates[new.adapter] or "") for new in sets}
    if not any(bodies.values()):
        return
    choice = f"{{%- set adapter = adapter if adapter is defined else {first.adapter!r} -%}}"
    writes = {new.adapter: guard(new) + f"{{{{- {new.text!r} -}}}}" for new in sets}
    if len(set(bodies.values())) == 1:
        tokens = "".join(branch(number, adapter, write) for number, (adapter, write) in enumerate(writes.items()))
        text = f"{choice}{tokens}{last_branches(sets, '')}{{%- endif -%}}{bodies[first.adapter]}"
    else:
        chats = "".join(
            branch(number, adapter, write + bodies[adapter]) for number, (adapter, write) in enumerate(writes.items())
        )
        text = f"{choice}{chats}{last_branches(sets, bodies[first.adapter])}{{%- endif -%}}"
    tokenizer.chat_template = text


def before_plain_text(sets: Sequence[NewTokens]) -> NewTokens | None:
    """Return the tokens that stand before plain text: the first that any engine can serve."""
    return next((new for new in sets if not new.is_prefix), None)


def guard(new: NewTokens) -> str:
    """Return what refuses a prefix in a server that would compute its placeholders; empty for embeddings."""
    if not new.is_prefix:
        return ""
    message = f"adapter {new.adapter} is a prefix, which this server was not started for: see scripts/serve.sh"
    is_missing = "{%- if not (prefixes_served is defined and prefixes_served) -%}"
    return f"{is_missing}{{{{- raise_exception({message!r}) -}}}}{{%- endif -%}}"


def post_processor(own: dict[str, Any] | None, new: NewTokens) -> dict[str, Any]:
    """Return a post-processor that writes new tokens before those of the tokenizer's own, as tokenizers' JSON.

    Args:
        own: the tokenizer's post-processor; None: it has none.
        new: tokens to write first.
    """
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token in new.tokens]
    known = {
        token: {"id": token, "ids": [number], "tokens": [token]}
        for token, number in zip(new.tokens, new.ids, strict=True)
    }
    if own is None:
        return {"type": "TemplateProcessing", "single": [*first, A], "pair": [*first, A, B], "special_tokens": known}
    if own["type"] == "TemplateProcessing":
        single, pair = [*first, *own["single"]], [*first, *own["pair"]]
        return {**own, "single": single, "pair": pair, "special_tokens": own["special_tokens"] | known}
    parts = own["processors"] if own["type"] == "Sequence" else [own]
    if any(part["type"] == "TemplateProcessing" for part in parts):
        parts = [post_processor(part, new) if part["type"] == "TemplateProcessing" else part for part in parts]
    else:
        parts = [*parts, post_processor(None, new)]
    return {"type": "Sequence", "processors": parts}


def branch(number: int, adapter: str, body: str) -> str:
    """Return the branch of the template for one adapter, the `number`-th."""
    return f"{{%- {'elif' if number else 'if'} adapter == {adapter!r} -%}}{body}"


def last_branches(sets: Sequence[NewTokens], base_body: str) -> str:
    """Return the branches for the plain model and for an unknown name, which is an error."""
    names = ", ".join([new.adapter for new in sets] + [BASE])
    wrong = f"{{{{- raise_exception('no adapter ' ~ adapter ~ ': there are {names}') -}}}}"
    return f"{{%- elif adapter == {BASE!r} -%}}{base_body}{{%- else -%}}{wrong}"


def without_generation_marks(template: str) -> str:
    """Return a chat template without its `generation` blocks, which only training needs and few servers know.

    White space stays as it was.
    """
    return re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", template)
