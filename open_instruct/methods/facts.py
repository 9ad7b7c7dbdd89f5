"""Measurements of a base model before training, so that a recipe fits its scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TEXT = "Read what the user wrote and give the answer that is wanted, in the form that is wanted."


@dataclass(frozen=True)
class ModelFacts:
    """Scales of a base model."""

    hidden_size: int
    embedding_std: float  # of all entries of the token embeddings of ordinary tokens
    embedding_norm: float  # median length of a token's embedding
    key_std: float = math.nan  # of the entries of a text's keys, median over layers; for methods with `wants_keys`
    makes_pairs: bool = False  # it is an encoder–decoder, whose keys are its decoder's


def model_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keys: bool = False) -> ModelFacts:
    """Measure the base. The embedding's own scaling (Gemma) is included, because a soft prompt enters after it.

    Args:
        model: the base; on the meta device, where it has no values, spread and length are nan.
        tokenizer: the base's tokenizer.
        keys: also measure the standard deviation of the keys.
    """
    import torch

    from open_instruct.model.tokens import ordinary_tokens

    embedding = model.get_input_embeddings()
    hidden_size = model.config.get_text_config().hidden_size
    if embedding.weight.device.type == "meta":
        return ModelFacts(hidden_size, math.nan, math.nan, makes_pairs=model.config.is_encoder_decoder)
    ids = torch.tensor(ordinary_tokens(tokenizer), device=embedding.weight.device)
    chosen = ids[torch.linspace(0, len(ids) - 1, min(len(ids), 10_000)).long()]
    with torch.no_grad():
        vectors = embedding(chosen).float()
    spread = key_std(model, tokenizer) if keys else math.nan
    return ModelFacts(
        hidden_size, vectors.std().item(), vectors.norm(dim=1).median().item(), spread, model.config.is_encoder_decoder
    )


def key_std(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the standard deviation of a text's keys, median over layers; nan where the base keeps no keys."""
    try:
        return median(
            keys.float().std().item()
            for keys, _ in cached(model, tokenizer(DEFAULT_TEXT, add_special_tokens=False)["input_ids"])
        )
    except (ValueError, RuntimeError, AttributeError, TypeError):
        return math.nan


def cached(model: PreTrainedModel, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values [1, K, T, E] of each layer for T tokens, also where a layer's window is shorter than T."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache()  # a cache that the model makes itself keeps no more than the window
    inputs = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        if model.config.is_encoder_decoder:  # what its decoder computes if it reads the tokens as well
            both = EncoderDecoderCache(cache, DynamicCache())
            model.eval()(inputs, decoder_input_ids=inputs, past_key_values=both, use_cache=True)
        else:
            model.eval()(inputs, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def between(narrow: float, wide: float, hidden_size: int) -> float:
    """Interpolate a rate between `narrow` at hidden size 128, measured here, and `wide` at 2048 and more, as published.

    In between it is a power of the hidden size: Adam's best rate falls with the width (Yang et al. 2022). Below 128 it
    follows the same power, and below 64 it is constant.
    """
    share = (math.log(min(max(hidden_size, 64), 2048)) - math.log(128)) / math.log(2048 / 128)
    return narrow * (wide / narrow) ** share
