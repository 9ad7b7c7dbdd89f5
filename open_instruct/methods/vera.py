"""VeRA (Kopiczko et al. 2024): LoRA whose matrices are random, frozen and shared, scaled by trained vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.methods.base import LayerMethod, Recipe, task_type
from open_instruct.methods.facts import ModelFacts, between
from open_instruct.methods.features import Feature

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHOLE_BASE = "its frozen matrices are buffers that only the main process would have: use DDP or ZeRO-2"


@dataclass(frozen=True)
class VeraSettings:
    """Size of the update."""

    vera_rank: int
    vera_dropout: float


class Vera(LayerMethod):
    """Two vectors for each linear layer but the head: ΔW = diag(b) B diag(d) A, of which b and d are trained."""

    name, title = "vera", "VeRA"
    settings_class = VeraSettings
    peft_types = continues_from = ("VERA",)
    merges_into = "weights"
    wants_plain_layers = True
    obstacles = MappingProxyType({Feature.ZERO_3: WHOLE_BASE, Feature.FSDP: WHOLE_BASE})

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return rates some twenty times LoRA's: the vectors scale random matrices, and d starts at 0.1."""
        return Recipe(
            learning_rate=between(6e-2, 4e-3, facts.hidden_size),
            warmup_ratio=0.06,
            sources="measured here (hidden size 64 to 128), Kopiczko et al. 2024 (4e-3 to 2e-2 at 768 to 4096)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: VeraSettings) -> nn.Module:
        """Put PEFT's VeRA on all linear layers."""
        from peft import VeraConfig, get_peft_model

        config = VeraConfig(
            task_type=task_type(model),
            r=settings.vera_rank,
            vera_dropout=settings.vera_dropout,
            target_modules="all-linear",
        )
        return get_peft_model(model, config)

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return rank and dropout."""
        return {"vera_rank": adapter.get("r", 256), "vera_dropout": adapter.get("vera_dropout", 0.0)}

    def num_numbers(self, model: Any, settings: VeraSettings) -> int:
        """See `Method`: nearly all are in two frozen matrices. Without a gradient, each counts half."""
        from open_instruct.model.sizes import linear_sizes

        inputs, outputs = zip(*linear_sizes(model), strict=True)
        return settings.vera_rank * (max(inputs) + max(outputs)) // 2

    def drops_inputs(self, settings: VeraSettings) -> bool:
        """See `Method`."""
        return settings.vera_dropout > 0
