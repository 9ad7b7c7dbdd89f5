"""P-tuning (Liu et al. 2021): a soft prompt that a small network computes from trained inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from open_instruct.methods import placement
from open_instruct.methods.base import (
    EmbeddingPrompt,
    Recipe,
    TrainedAdapter,
    embedding_sizes,
    load_network,
    task_type,
)
from open_instruct.methods.facts import ModelFacts, between, model_facts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PTuningSettings:
    """Size of the soft prompt and of its network."""

    num_virtual_tokens: int
    encoder_hidden_size: int | None  # None: the model's hidden size
    soft_prompt_at: Sequence[str] | None = None  # None: before the encoder's input, where there is one


class PTuning(EmbeddingPrompt):
    """Prompt tuning, reparameterised by a three-layer perceptron. Only its output is needed after training."""

    name, title = "p_tuning", "P-tuning"
    settings_class = PTuningSettings
    peft_types = continues_from = ("P_TUNING", placement.OWN_TYPES["P_TUNING"])
    max_virtual_tokens = 50
    max_virtual_tokens_of_pairs = 20
    network_remedy = "--use_prompt_tuning"

    def num_numbers(self, model: Any, settings: PTuningSettings) -> int:
        """See `Method`: the inputs, and a network of three layers."""
        hidden = int(model.config.get_text_config().hidden_size)
        width = settings.encoder_hidden_size or hidden
        return settings.num_virtual_tokens * hidden + width * (2 * hidden + width)

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return a rate for the network: it depends on the width, not on the spread of the embeddings."""
        return Recipe(
            learning_rate=between(1e-2, 3e-4, facts.hidden_size),
            warmup_ratio=0.06,
            sources="measured here (hidden size 64 to 128), PEFT method comparison and NeMo (1e-4 at hidden size 3072)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PTuningSettings) -> nn.Module:
        """Put PEFT's P-tuning on, with an output layer scaled so that the prompt starts with the embeddings' spread."""
        import torch

        places = placement.own_places(settings.soft_prompt_at, "encoder")
        wrapped = placement.put_prompt_on(
            model,
            "P_TUNING",
            places,
            task_type=task_type(model),
            num_virtual_tokens=settings.num_virtual_tokens,
            num_transformer_submodules=1,  # see prompt tuning
            **embedding_sizes(model, places),
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=settings.encoder_hidden_size or model.config.get_text_config().hidden_size,
        )
        encoder = wrapped.prompt_encoder["default"]
        with torch.no_grad():
            last = encoder.mlp_head[-1]
            last.bias.zero_()
            prompt = encoder(torch.arange(settings.num_virtual_tokens, device=last.weight.device))
            last.weight.mul_(model_facts(model, tokenizer).embedding_std / prompt.std(correction=0))
        return wrapped

    def wrap_trained(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PTuningSettings,
        adapter: TrainedAdapter,
    ) -> nn.Module:
        """See `Method`: the network is restored, because PEFT's format holds only its output."""
        wrapped = self.wrap(model, tokenizer, settings)
        if adapter.network is not None:
            load_network(wrapped, adapter.network)
        return wrapped

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return the sizes of prompt and network, and the place."""
        return {
            **placement.adopted_places(adapter, "encoder"),
            "num_virtual_tokens": adapter.get("num_virtual_tokens"),
            "encoder_hidden_size": adapter.get("encoder_hidden_size"),
        }

    def keeps_network(self, settings: PTuningSettings) -> bool:
        """See `Method`."""
        return True
