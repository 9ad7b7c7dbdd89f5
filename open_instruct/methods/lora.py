"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023)."""

from __future__ import annotations

from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.methods.base import Method, MethodSettings, ModelFacts, Recipe, between


class Lora(Method):
    """Low-rank updates of every linear layer but the head."""

    name, title = "lora", "LoRA"

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """PEFT's method comparison and QLoRA's table agree on 1e-4 to 2e-4 for billions of parameters."""
        return Recipe(
            learning_rate=between(2e-3, 2e-4, facts.hidden_size),
            warmup_ratio=0.03,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="measured here (hidden size 64 to 128), Dettmers et al. 2023 and PEFT method comparison (2048 and more)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """PEFT's LoRA on all linear layers."""
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules="all-linear",
        )
        return get_peft_model(model, config)


class QLora(Lora):
    """LoRA on a base that is loaded in 4-bit NormalFloat."""

    name, title = "qlora", "QLoRA"
    needs_quantised_base = True
