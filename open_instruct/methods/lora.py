"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.methods.base import LayerMethod, Recipe, task_type, unusual_linears
from open_instruct.methods.facts import ModelFacts, between
from open_instruct.methods.features import Feature

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARDED = "quantised weights can't be sharded: use DDP or ZeRO-2"


@dataclass(frozen=True)
class LoraSettings:
    """Size of the update."""

    lora_rank: int
    lora_alpha: float
    lora_dropout: float


class Lora(LayerMethod):
    """Low-rank updates of every linear layer but the head."""

    name, title = "lora", "LoRA"
    settings_class = LoraSettings
    peft_types = continues_from = ("LORA",)
    merges_into = "weights"
    known_to_vllm = True

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return, for wide models, a rate on which PEFT's method comparison and QLoRA's table agree: 1e-4 to 2e-4."""
        return Recipe(
            learning_rate=between(2e-3, 2e-4, facts.hidden_size),
            warmup_ratio=0.03,
            sources="measured here (hidden size 64 to 128), Dettmers et al. 2023 and PEFT method comparison (2048 and "
            "more)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: LoraSettings) -> nn.Module:
        """Put PEFT's LoRA on all linear layers."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type=task_type(model),
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
            exclude_modules=unusual_linears(model) or None,
        )
        return get_peft_model(model, config)

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return rank, scale and dropout."""
        return {
            "lora_rank": adapter.get("r", 8),
            "lora_alpha": adapter.get("lora_alpha", 8),
            "lora_dropout": adapter.get("lora_dropout", 0.0),
        }

    def num_numbers(self, model: Any, settings: LoraSettings) -> int:
        """See `Method`."""
        from open_instruct.model.sizes import linear_sizes

        return settings.lora_rank * sum(inputs + outputs for inputs, outputs in linear_sizes(model))

    def drops_inputs(self, settings: LoraSettings) -> bool:
        """See `Method`."""
        return settings.lora_dropout > 0


class QLora(Lora):
    """LoRA on a base that is loaded in 4-bit NormalFloat."""

    name, title = "qlora", "QLoRA"
    quantises_base = "4bit"
    obstacles = MappingProxyType(
        {
            Feature.EIGHT_BITS: "its base is held in 4 bits: drop --load_in_8bit, or use --use_lora",
            Feature.ZERO_3: SHARDED,
            Feature.FSDP: SHARDED,
        }
    )
