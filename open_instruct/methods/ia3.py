"""IA3 (Liu et al. 2022): learned factors on keys, values and feed-forward activations."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError
from open_instruct.methods.base import LayerMethod, Recipe, task_type
from open_instruct.methods.facts import ModelFacts, between
from open_instruct.methods.features import Feature

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

USUAL_LAYERS = ["k_proj", "v_proj", "down_proj"]  # what PEFT names for Llama and most others


class Ia3(LayerMethod):
    """Three trained vectors in each layer, which start at 1."""

    name, title = "ia3", "IA3"
    peft_types = continues_from = ("IA3",)
    merges_into = "weights"
    obstacles = MappingProxyType(
        {
            Feature.ZERO_3: "DeepSpeed loses track of IA3's factors, which stand outside of modules: use DDP, ZeRO-2 "
            "or FSDP"
        }
    )

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return large rates: the factors start at 1, and a step has to be large on that scale."""
        return Recipe(
            learning_rate=between(6e-2, 1e-2, facts.hidden_size),
            warmup_ratio=0.06,
            sources="measured here (hidden size 64 to 128), Liu et al. 2022 (3e-3 with Adafactor), raised",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Any) -> nn.Module:
        """Put IA3 on the layers that PEFT knows for this architecture, else on those with Llama's names."""
        from peft import IA3Config, get_peft_model

        try:
            return get_peft_model(model, IA3Config(task_type=task_type(model)))
        except ValueError as error:
            names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            if not set(USUAL_LAYERS) <= names:
                raise InputError(
                    f"IA3 does not know the layers of a {model.config.model_type} model ({error}): use --use_lora"
                ) from None
        config = IA3Config(
            task_type=task_type(model), target_modules=USUAL_LAYERS, feedforward_modules=USUAL_LAYERS[2:]
        )
        return get_peft_model(model, config)
