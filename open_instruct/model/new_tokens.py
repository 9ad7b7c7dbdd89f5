"""New tokens of a tokenizer, and rows of the embedding matrix and the head for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from open_instruct.errors import InputError
from open_instruct.flags.lora import starts_of_tokens


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
    """Add the tokens of --new_tokens to a tokenizer, which finds them wherever they stand in a text.

    Raises:
        InputError: one is in the vocabulary already, or the tokenizer does not find it.
    """
    known = tokenizer.get_vocab()
    for token in starts_of_tokens(words):
        if token in known:
            raise InputError(f"--new_tokens {token}: it is in the vocabulary already: remove it")
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
        if tokenizer.convert_tokens_to_ids(token) not in tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"]:
            raise InputError(
                f"--new_tokens {token}: this model's tokenizer does not find it in a text: write it otherwise"
            )


def token_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Return the ids of the tokens of --new_tokens."""
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in starts_of_tokens(words)]


def sources_of(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[int, list[int]]:
    """Return, for the id of each token of --new_tokens, the tokens whose mean it starts from; none: all of them.

    Raises:
        InputError: the text that it should start from has no token.
    """
    sources: dict[int, list[int]] = {}
    for token, text in starts_of_tokens(words).items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        if text and not ids:
            raise InputError(f"--new_tokens {token}={text}: the text has no token: give another, or none")
        sources[int(tokenizer.convert_tokens_to_ids(token))] = list(ids)
    return sources


@torch.no_grad()
def grow_vocabulary(model: Any, sources: Mapping[int, Sequence[int]]) -> None:
    """Give new tokens a row in the embedding matrix, and in the head where that is another matrix.

    A row is the mean of those of other tokens. Spare rows, with which many matrices are filled up, are used; only where
    there are too few, the matrices grow.

    Args:
        model: a causal language model; changed in place.
        sources: for each new id, the tokens of the mean; empty: every row that the model had.

    Raises:
        InputError: the head has biases, which no adapter would hold, or the matrices are quantised.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise InputError(
            f"--new_tokens: the head of a {model.config.model_type} model has biases, which PEFT can't train"
        )
    num_rows = embedding.weight.shape[0]
    first_new = min(sources)
    if max(sources) >= num_rows:
        model.resize_token_embeddings(max(sources) + 1, mean_resizing=False)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = {id(layer.weight): layer.weight for layer in (embedding, head)}
    for weight in weights.values():
        if not weight.is_floating_point():
            raise InputError("--new_tokens: the embeddings are quantised: load the base in full precision")
        old = weight[: min(first_new, num_rows)].float()
        for new, ids in sources.items():
            weight[new] = (old[list(ids)] if ids else old).mean(0).to(weight.dtype)


def trained_rows(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """Return PEFT's `trainable_token_indices`: the embedding matrix, and a head that is not the same matrix."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    layers = [embedding] if model.config.get_text_config().tie_word_embeddings else [embedding, head]
    return {names[id(layer)]: list(ids) for layer in layers}
