"""What a fine-tuning method is: how the base is wrapped, and which hyperparameters it recommends."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.model.shared_prefix import SoftPrompt
from open_instruct.model.tokens import ordinary_tokens

DEFAULT_TEXT = "Read what the user wrote and give the answer that is wanted, in the form that is wanted."


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the base before training."""

    hidden_size: int
    embedding_std: float  # of all entries of the token embeddings of ordinary tokens
    embedding_norm: float  # median length of one
    key_std: float = (
        math.nan
    )  # of the entries of a text's keys, median over layers; measured for methods that `wants_keys`


@dataclass(frozen=True)
class Recipe:
    """Recommended hyperparameters, each filled in only where the user set none. `sources` says where they come from."""

    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    lr_scheduler_type: str
    clip_grad_norm: float
    sources: str
    prompt_tuning_init: str | None = None
    prefix_init: str | None = None


@dataclass(frozen=True)
class MethodSettings:
    """The choices that shape an adapter, after the recipe has filled them."""

    num_virtual_tokens: int | None = None
    prompt_tuning_init: str | None = None
    prompt_tuning_init_text: str | None = None
    prefix_init: str | None = None
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    lora_rank: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.1


class Method(ABC):
    """One way to fine-tune. `METHODS` in this package lists them all."""

    name: str
    title: str
    is_soft_prompt = False
    most_virtual_tokens = 0  # of the recipe
    wants_keys = False
    needs_quantised_base = False

    def recommended_virtual_tokens(self, context: int | None, max_seq_length: int | None) -> int:
        """Length of the soft prompt: longer ones learn faster, so as long as is useful where there is room.

        Args:
            context: positions of the model; None: unlimited.
            max_seq_length: tokens that the user wants for a conversation; None: an eighth of the context goes to the prompt at most.
        """
        if context is None:
            return self.most_virtual_tokens
        return max(1, min(self.most_virtual_tokens, context - max_seq_length if max_seq_length else context // 8))

    @abstractmethod
    def recipe(self, facts: ModelFacts, settings: MethodSettings) -> Recipe:
        """Hyperparameters for a base with these facts."""

    @abstractmethod
    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings) -> nn.Module:
        """The base with a float32 adapter that is the only trainable part. A base on the meta device gets one without values."""

    def soft_prompt(self, model: Any) -> SoftPrompt | None:
        """What the wrapped model puts before every example, differentiable; None where the method has no such thing."""
        return None

    def starts(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: MethodSettings, number: int
    ) -> list[torch.Tensor]:
        """Values of the soft prompt's own parameter to choose a start from, the first as `wrap` left it; none where that has no choice."""
        return []

    def begin_at(self, model: Any, start: torch.Tensor) -> None:
        """Take one of `starts`."""
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(start)

    def start(self, model: Any) -> torch.Tensor | None:
        """The soft prompt [P, D] as it is now, on the CPU, where the method has one of embeddings."""
        return None


class EmbeddingPrompt(Method):
    """A method whose soft prompt is embeddings."""

    is_soft_prompt = True

    def soft_prompt(self, model: Any) -> SoftPrompt:
        """[P, D], from PEFT's own encoder."""
        embeddings = model.get_prompt(batch_size=1)[0]
        return SoftPrompt(embeddings=embeddings, length=len(embeddings))

    def start(self, model: Any) -> torch.Tensor:
        """See `Method`."""
        with torch.no_grad():
            return model.get_prompt(batch_size=1)[0].detach().float().cpu()


def model_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, keys: bool = False) -> ModelFacts:
    """Measure the base. The embedding's own scaling (Gemma) is included, as a soft prompt stands behind it.

    Spread and length are nan where the model has no values (on the meta device). `keys`: also the spread of keys.
    """
    embedding = model.get_input_embeddings()
    hidden_size = model.config.get_text_config().hidden_size
    if embedding.weight.device.type == "meta":
        return ModelFacts(hidden_size, math.nan, math.nan)
    ids = torch.tensor(ordinary_tokens(tokenizer), device=embedding.weight.device)
    chosen = ids[torch.linspace(0, len(ids) - 1, min(len(ids), 10_000)).long()]
    with torch.no_grad():
        vectors = embedding(chosen).float()
    spread = key_std(model, tokenizer) if keys else math.nan
    return ModelFacts(hidden_size, vectors.std().item(), vectors.norm(dim=1).median().item(), spread)


def key_std(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Standard deviation of the entries of the keys that the base computes for a text, median over layers; nan where it keeps none."""
    try:
        return median(
            keys.float().std().item()
            for keys, _ in cached(model, tokenizer(DEFAULT_TEXT, add_special_tokens=False)["input_ids"])
        )
    except (ValueError, RuntimeError, AttributeError, TypeError):
        return math.nan


@torch.no_grad()
def cached(model: PreTrainedModel, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [1, K, T, E] of each layer for T tokens, all of them even where a layer's window is shorter."""
    cache = DynamicCache()  # of its own making, a model keeps no more than the window
    model.eval()(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def between(narrow: float, wide: float, hidden_size: int) -> float:
    """What was measured here on models 128 wide, and what is published for those 2048 wide or wider; a power of the width in between.

    Adam's best rate falls with the width (Yang et al. 2022). Below 64 it rises no further.
    """
    share = (math.log(min(max(hidden_size, 64), 2048)) - math.log(128)) / math.log(2048 / 128)
    return narrow * (wide / narrow) ** share
