"""IA3 (Liu et al. 2022): learned factors on keys, values and feed-forward activations."""

from __future__ import annotations

from peft import IA3Config, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.errors import InputError
from open_instruct.methods.base import Method, MethodSettings, ModelFacts, Recipe, between

USUAL_LAYERS = ["k_proj", "v_proj", "down_proj"]  # what PEFT names for Llama and most others


class Ia3(Method):
    """Three vectors a layer, which start at 1."""

    name, title = "ia3", "IA3"

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """The factors start at 1, and a step has to be large on that scale."""
        return Recipe(
            learning_rate=between(6e-2, 1e-2, facts.hidden_size),
            warmup_ratio=0.06,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="measured here (hidden size 64 to 128), Liu et al. 2022 (3e-3 with Adafactor), raised",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """IA3 on the layers that PEFT knows for this architecture, else on keys, values and the feed-forward's last layer."""
        try:
            return get_peft_model(model, IA3Config(task_type=TaskType.CAUSAL_LM))
        except ValueError as error:
            names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
            if not set(USUAL_LAYERS) <= names:
                raise InputError(
                    f"IA3 does not know the layers of a {model.config.model_type} model ({error}): use --use_lora"
                ) from None
        config = IA3Config(
            task_type=TaskType.CAUSAL_LM, target_modules=USUAL_LAYERS, feedforward_modules=USUAL_LAYERS[2:]
        )
        return get_peft_model(model, config)
