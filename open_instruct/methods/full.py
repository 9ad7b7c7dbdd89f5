"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.methods.base import Method, MethodSettings, ModelFacts, Recipe, between


class Full(Method):
    """All weights, no adapter."""

    name, title = "full", "full fine-tuning"

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """open-instruct's 2e-5 for wide models."""
        return Recipe(
            learning_rate=between(5e-4, 2e-5, facts.hidden_size),
            warmup_ratio=0.03,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="measured here (hidden size 64 to 128), open-instruct (2048 and more)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """The model as it is, in float32."""
        return model.float().requires_grad_(True)
