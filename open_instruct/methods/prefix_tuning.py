"""Prefix tuning (Li and Liang 2021): P trained keys and values before each layer's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PrefixTuningConfig, TaskType, get_peft_model
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.errors import InputError
from open_instruct.methods.base import DEFAULT_TEXT, Method, MethodSettings, ModelFacts, Recipe, between, cached
from open_instruct.model.shared_prefix import SoftPrompt
from open_instruct.model.tokens import random_tokens, text_tokens


class PrefixTuning(Method):
    """A soft prompt of keys and values, with or without a network that computes them."""

    name, title, is_soft_prompt = "prefix_tuning", "prefix tuning", True
    most_virtual_tokens = 50
    wants_keys = True

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """A rate in proportion to the spread of the base's own keys; a network in between wants less."""
        spread = facts.key_std if math.isfinite(facts.key_std) else 1.5
        return Recipe(
            learning_rate=between(1e-2, 3e-4, facts.hidden_size)
            if settings.prefix_projection
            else spread * between(0.06, 0.012, max(facts.hidden_size, 128)),
            warmup_ratio=0.1,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="rate over keys' standard deviation measured here (hidden size 64 to 128); for 2048 and more LLM-Adapters (3e-2), "
            "Eyuboglu et al. 2025 (2e-2, start from a text)",
            prefix_init="zero" if settings.prefix_projection else "screened",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """PEFT's prefix tuning; `text` starts from the keys and values that the base computes for a text."""
        assert settings.num_virtual_tokens is not None
        start = None
        if settings.prefix_init in ("text", "screened") and model.device.type != "meta":
            ids = text_tokens(tokenizer, settings.prompt_tuning_init_text or DEFAULT_TEXT, settings.num_virtual_tokens)
            start = keys_and_values(model, ids)
        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=settings.num_virtual_tokens,
            prefix_projection=settings.prefix_projection,
            encoder_hidden_size=settings.encoder_hidden_size or model.config.get_text_config().hidden_size,
            init_weights="zero" if settings.prefix_init == "zero" else None,
        )
        wrapped = get_peft_model(model, config)
        if start is not None:
            self.begin_at(wrapped, start)
        return wrapped

    def starts(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings, number: int
    ) -> list[torch.Tensor]:
        """Keys and values of the text, and of random tokens, as PEFT's encoder holds them."""
        assert settings.num_virtual_tokens is not None
        first = model.prompt_encoder["default"].embedding.weight.detach().clone()
        base, others = (
            model.get_base_model(),
            [random_tokens(tokenizer, settings.num_virtual_tokens) for _ in range(number - 1)],
        )
        return [first, *(keys_and_values(base, ids) for ids in others)]

    def soft_prompt(self, model: Any) -> SoftPrompt:
        """Keys and values [1, K, P, E] of each layer, as PEFT puts them into its cache."""
        cache = model.get_prompt(batch_size=1)
        length = model.active_peft_config.num_virtual_tokens
        return SoftPrompt(keys_values=[(layer.keys, layer.values) for layer in cache.layers], length=length)


@torch.no_grad()
def keys_and_values(base: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """What a base computes for P tokens, as [P, 2 · L · K · E] in float32: the layout of PEFT's encoder.

    Raises:
        InputError: the base keeps no keys and values for each layer.
    """
    try:
        pairs = cached(base, ids)
        found: torch.Tensor = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=len(ids))
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        kind, reason = base.config.model_type, " ".join(str(error).split())[:200]
        raise InputError(
            f"a prefix can't start from tokens on a {kind} model ({reason}): use --prefix_init zero"
        ) from error
    return found.float()
