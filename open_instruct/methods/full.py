"""Full fine-tuning: every parameter is trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.methods.base import Method, MethodSettings, ModelFacts, Recipe, width_scaled


class Full(Method):
    """All weights, no adapter."""

    name, title = "full", "full fine-tuning"

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """open-instruct's 2e-5, more for narrow models."""
        return Recipe(
            learning_rate=width_scaled(2e-5, facts.hidden_size),
            warmup_ratio=0.03,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="open-instruct; rate over width after Yang et al. 2022",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """The model as it is, in float32."""
        return model.float().requires_grad_(True)
