"""P-tuning (Liu et al. 2021): a soft prompt that a small network computes from trained inputs."""

from __future__ import annotations

import torch
from peft import PromptEncoderConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.methods.base import EmbeddingPrompt, MethodSettings, ModelFacts, Recipe, between, model_facts


class PTuning(EmbeddingPrompt):
    """Prompt tuning, reparameterised by a three-layer perceptron. Only its output is needed after training."""

    name, title = "p_tuning", "P-tuning"
    most_virtual_tokens = 50

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """The rate is the network's, not the prompt's, so it goes with the width, not with the embeddings' spread."""
        return Recipe(
            learning_rate=between(1e-2, 3e-4, facts.hidden_size),
            warmup_ratio=0.06,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="measured here (hidden size 64 to 128), PEFT method comparison and NeMo (1e-4 at hidden size 3072)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """PEFT's P-tuning with an output layer scaled so that the prompt starts with the embeddings' spread."""
        assert settings.num_virtual_tokens is not None
        config = PromptEncoderConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=settings.num_virtual_tokens,
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=settings.encoder_hidden_size or model.config.get_text_config().hidden_size,
        )
        wrapped = get_peft_model(model, config)
        encoder = wrapped.prompt_encoder["default"]
        with torch.no_grad():
            last = encoder.mlp_head[-1]
            last.bias.zero_()
            prompt = encoder(torch.arange(settings.num_virtual_tokens, device=last.weight.device))
            last.weight.mul_(model_facts(model, tokenizer).embedding_std / prompt.std(correction=0))
        return wrapped
