"""Prompt tuning (Lester et al. 2021): P trained embeddings before the input."""

from __future__ import annotations

from typing import Any

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.methods.base import DEFAULT_TEXT, EmbeddingPrompt, MethodSettings, ModelFacts, Recipe
from open_instruct.model.tokens import random_tokens, text_tokens


class PromptTuning(EmbeddingPrompt):
    """A soft prompt of embeddings."""

    name, title = "prompt_tuning", "prompt tuning"
    most_virtual_tokens = 100

    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """A rate in proportion to the embeddings' spread: a step must be large on their scale, whatever that is."""
        return Recipe(
            learning_rate=0.5 * facts.embedding_std,
            warmup_ratio=0.06,
            weight_decay=0.0,
            lr_scheduler_type="linear",
            clip_grad_norm=1.0,
            sources="Lester et al. 2021, PEFT method comparison; rate = 0.5 × embedding standard deviation, measured here",
            prompt_tuning_init="screened",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """PEFT's prompt tuning; the start is set here, on real tokens only.

        PEFT samples from every row of the embedding matrix, unused and special ones included, and its `random` draws
        N(0, 1), some 50 times the spread of a large model's embeddings: the start from which the loss rises.
        """
        assert settings.num_virtual_tokens is not None
        count = settings.num_virtual_tokens
        wrapped = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=count))
        config = wrapped.peft_config["default"]
        if settings.prompt_tuning_init == "random":
            return wrapped
        text = settings.prompt_tuning_init_text or DEFAULT_TEXT
        if settings.prompt_tuning_init in ("text", "screened"):
            ids = text_tokens(tokenizer, text, count)
        else:
            ids = random_tokens(tokenizer, count)
        if settings.prompt_tuning_init == "text":
            config.prompt_tuning_init, config.prompt_tuning_init_text = PromptTuningInit.TEXT, text
            config.tokenizer_name_or_path = tokenizer.name_or_path
        else:
            config.prompt_tuning_init = PromptTuningInit.SAMPLE_VOCAB
        embedding = model.get_input_embeddings()
        with torch.no_grad():
            start = embedding(torch.tensor(ids, device=embedding.weight.device)).float()
            wrapped.prompt_encoder["default"].embedding.weight.copy_(start)
        return wrapped

    def starts(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings, number: int
    ) -> list[torch.Tensor]:
        """Embeddings [P, D] of the text, and of random tokens."""
        assert settings.num_virtual_tokens is not None
        embedding = model.get_base_model().get_input_embeddings()
        found = [model.prompt_encoder["default"].embedding.weight.detach().clone()]
        with torch.no_grad():
            for _ in range(number - 1):
                ids = random_tokens(tokenizer, settings.num_virtual_tokens)
                found.append(embedding(torch.tensor(ids, device=embedding.weight.device)).float())
        return found
