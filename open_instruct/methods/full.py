"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.methods.base import Method, Recipe
from open_instruct.methods.facts import ModelFacts, between
from open_instruct.methods.features import Feature

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTISED = "quantised weights can't be trained in full: choose another method, for example --use_lora"


class Full(Method):
    """Training of all weights, without an adapter."""

    name, title = "full", "full fine-tuning"
    trains_base = True
    memory_kind = "full"
    obstacles = MappingProxyType({Feature.EIGHT_BITS: QUANTISED, Feature.FOUR_BITS: QUANTISED})

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return open-instruct's 2e-5 for wide models."""
        return Recipe(
            learning_rate=between(5e-4, 2e-5, facts.hidden_size),
            warmup_ratio=0.03,
            sources="measured here (hidden size 64 to 128), open-instruct (2048 and more)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Any) -> nn.Module:
        """Return the model as it is, in float32."""
        return model.float().requires_grad_(True)
