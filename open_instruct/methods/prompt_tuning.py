"""Prompt tuning (Lester et al. 2021): P trained embeddings before the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from open_instruct.methods import placement
from open_instruct.methods.base import (
    EmbeddingPrompt,
    Recipe,
    TrainedAdapter,
    embedding_at,
    embedding_sizes,
    task_type,
)
from open_instruct.methods.facts import DEFAULT_TEXT, ModelFacts

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptTuningSettings:
    """Length and start of the soft prompt."""

    num_virtual_tokens: int
    prompt_tuning_init: str
    prompt_tuning_init_text: str | None  # None: `DEFAULT_TEXT`
    soft_prompt_at: Sequence[str] | None = None  # None: before the encoder's input, where there is one


class PromptTuning(EmbeddingPrompt):
    """A soft prompt of embeddings."""

    name, title = "prompt_tuning", "prompt tuning"
    settings_class = PromptTuningSettings
    peft_types = ("PROMPT_TUNING", placement.OWN_TYPES["PROMPT_TUNING"])
    continues_from = (
        *peft_types,
        "P_TUNING",
        placement.OWN_TYPES["P_TUNING"],
    )  # P-tuning's vectors, without its network
    trains_prompt_directly = True
    max_virtual_tokens = 100
    max_virtual_tokens_of_pairs = 20  # before an encoder longer ones learn later: measured here on a T5
    init_flag = "prompt_tuning_init"

    def num_numbers(self, model: Any, settings: PromptTuningSettings) -> int:
        """See `Method`."""
        return settings.num_virtual_tokens * int(model.config.get_text_config().hidden_size)

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return a rate in proportion to the embeddings' spread: a step must be large on that scale."""
        return Recipe(
            learning_rate=0.5 * facts.embedding_std,
            warmup_ratio=0.06,
            sources="Lester et al. 2021, PEFT method comparison; rate = 0.5 × embedding standard deviation, measured "
            "here",
            init="screened",
        )

    def wrap(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PromptTuningSettings
    ) -> nn.Module:
        """Put PEFT's prompt tuning on; the start is set here, on real tokens only.

        PEFT samples from every row of the embedding matrix, unused and special ones included, and its `random` draws
        N(0, 1), some 50 times the spread of a large model's embeddings: the start from which the loss rises.
        """
        from peft import PromptTuningInit

        from open_instruct.model.tokens import random_tokens, text_tokens

        num_tokens, places = settings.num_virtual_tokens, placement.own_places(settings.soft_prompt_at, "encoder")
        # Before one input alone: for encoder–decoders PEFT would make as many again, and not use them.
        wrapped = placement.put_prompt_on(
            model,
            "PROMPT_TUNING",
            places,
            task_type=task_type(model),
            num_virtual_tokens=num_tokens,
            num_transformer_submodules=1,
            **embedding_sizes(model, places),
        )
        config = wrapped.peft_config["default"]
        if settings.prompt_tuning_init == "random":
            return wrapped
        text = settings.prompt_tuning_init_text or DEFAULT_TEXT
        if settings.prompt_tuning_init in ("text", "screened"):
            ids = text_tokens(tokenizer, text, num_tokens)
        else:
            ids = random_tokens(tokenizer, num_tokens)
        if settings.prompt_tuning_init == "text":
            config.prompt_tuning_init, config.prompt_tuning_init_text = PromptTuningInit.TEXT, text
            config.tokenizer_name_or_path = tokenizer.name_or_path
        else:
            config.prompt_tuning_init = PromptTuningInit.SAMPLE_VOCAB
        self.set_init(wrapped, self.start_of(wrapped, ids))
        return wrapped

    def wrap_trained(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptTuningSettings,
        adapter: TrainedAdapter,
    ) -> nn.Module:
        """See `Method`: the vectors are the trained parameter."""
        wrapped = self.wrap(model, tokenizer, settings)
        if adapter.weights is not None:
            self.set_init(wrapped, adapter.weights["prompt_embeddings"])
        return wrapped

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return length and place."""
        return {
            "num_virtual_tokens": adapter.get("num_virtual_tokens"),
            **placement.adopted_places(adapter, "encoder"),
        }

    def start_of(self, model: Any, ids: list[int]) -> torch.Tensor:
        """Return embeddings [P, D]."""
        import torch

        embedding = embedding_at(model.get_base_model(), getattr(model.active_peft_config, placement.NAME, ()))
        with torch.no_grad():
            values: torch.Tensor = embedding(torch.tensor(ids, device=embedding.weight.device)).float()
        return values
