"""Prefix tuning (Li and Liang 2021): P trained keys and values before each layer's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError, one_line
from open_instruct.methods import placement
from open_instruct.methods.base import Method, Recipe, TrainedAdapter, load_network, task_type
from open_instruct.methods.facts import DEFAULT_TEXT, ModelFacts, between, cached
from open_instruct.methods.features import Feature

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from open_instruct.model.shared_prefix import SoftPrompt


@dataclass(frozen=True)
class PrefixTuningSettings:
    """Length, start and network of the prefix."""

    num_virtual_tokens: int
    prefix_init: str
    prompt_tuning_init_text: str | None  # None: `DEFAULT_TEXT`
    prefix_projection: bool
    encoder_hidden_size: int | None  # None: the model's hidden size
    prefix_freeze_first: bool = False
    soft_prompt_at: Sequence[str] | None = None  # None: before the decoder's own keys


class PrefixTuning(Method):
    """A soft prompt of keys and values, with or without a network that computes them."""

    name, title = "prefix_tuning", "prefix tuning"
    settings_class = PrefixTuningSettings
    peft_types = continues_from = ("PREFIX_TUNING", placement.OWN_TYPES["PREFIX_TUNING"])
    prompt_kind = "keys_values"
    max_virtual_tokens = 50
    max_virtual_tokens_of_pairs = 10  # T5's scores are not scaled, so a long prefix drowns a short answer at first
    network_remedy = "without --prefix_projection"
    init_flag = "prefix_init"
    wants_keys = True
    memory_kind = "soft prompt"
    merges_into = "tokens"
    obstacles = MappingProxyType(
        {
            Feature.PADDED_CHECKPOINTING: "PEFT passes a prefix through the cache, which checkpointing has to drop: "
            "leave --packing on, or checkpointing off"
        }
    )

    def num_numbers(self, model: Any, settings: PrefixTuningSettings) -> int:
        """See `Method`: keys and values of each layer, with a network the layer that computes them too."""
        if places := placement.own_places(settings.soft_prompt_at, "decoder"):
            from open_instruct.model.placed_prompts import prefix_width

            return settings.num_virtual_tokens * prefix_width(model, places)
        if sizes := decoder_sizes(model):
            return int(settings.num_virtual_tokens * 2 * sizes["num_layers"] * sizes["token_dim"])
        text = model.config.get_text_config()
        num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        keys = num_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        all_layers = 2 * text.num_hidden_layers * keys
        if not settings.prefix_projection:
            return int(settings.num_virtual_tokens * all_layers)
        width = settings.encoder_hidden_size or text.hidden_size
        return int(settings.num_virtual_tokens * keys + width * (keys + all_layers))

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return a rate in proportion to the spread of the base's own keys, or a lower one for a network.

        A decoder that reads an encoder starts from zeros: no text that it never wrote stands before its answers. In the
        encoder and across, a text helps.
        """
        spread = facts.key_std if math.isfinite(facts.key_std) else 1.5
        if facts.makes_pairs:
            return Recipe(
                learning_rate=spread * between(0.4, 0.08, max(facts.hidden_size, 128)),
                warmup_ratio=0.1,
                sources="rate over keys' standard deviation measured here on a T5 of hidden size 128; for 2048 "
                "and more a fifth of it, as for causal models",
                init="screened" if placement.own_places(values["soft_prompt_at"], "decoder") else "zero",
            )
        projected = values["prefix_projection"]
        return Recipe(
            learning_rate=between(1e-2, 3e-4, facts.hidden_size)
            if projected
            else spread * between(0.06, 0.012, max(facts.hidden_size, 128)),
            warmup_ratio=0.1,
            sources="rate over keys' standard deviation measured here (hidden size 64 to 128); for 2048 and more "
            "LLM-Adapters (3e-2), Eyuboglu et al. 2025 (2e-2, start from a text)",
            init="zero" if projected else "screened",
        )

    def wrap(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PrefixTuningSettings
    ) -> nn.Module:
        """Put PEFT's prefix tuning on; `text` starts from the keys and values that the base computes for a text."""
        from open_instruct.model.tokens import text_tokens

        places = placement.own_places(settings.soft_prompt_at, "decoder")
        values: dict[str, Any] = {
            "task_type": task_type(model),
            "num_virtual_tokens": settings.num_virtual_tokens,
            "init_weights": "zero" if settings.prefix_init == "zero" else None,
        }
        if places:
            from open_instruct.model.placed_prompts import prefix_width

            values |= {"num_layers": 1, "num_attention_heads": 1, "token_dim": prefix_width(model, places) // 2}
        else:
            width = settings.encoder_hidden_size or model.config.get_text_config().hidden_size
            values |= {"prefix_projection": settings.prefix_projection, "encoder_hidden_size": width}
            values |= decoder_sizes(model)
        start = None
        if settings.prefix_init in ("text", "screened") and model.device.type != "meta":
            ids = text_tokens(tokenizer, settings.prompt_tuning_init_text or DEFAULT_TEXT, settings.num_virtual_tokens)
            start = keys_and_values(model, ids, places)
        wrapped = placement.put_prompt_on(model, "PREFIX_TUNING", places, **values)
        wrapped.prompt_encoder["default"].freezes_first = settings.prefix_freeze_first
        if start is not None:
            self.set_init(wrapped, start)
        return wrapped

    def wrap_trained(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PrefixTuningSettings,
        adapter: TrainedAdapter,
    ) -> nn.Module:
        """See `Method`: with a projection the network is restored, else keys and values are the trained parameter."""
        wrapped: Any = self.wrap(model, tokenizer, settings)
        if adapter.network is not None:
            load_network(wrapped, adapter.network)
        elif adapter.weights is not None:
            import torch

            with torch.no_grad():
                wrapped.prompt_encoder["default"].load_prompt_embeddings(adapter.weights["prompt_embeddings"].float())
        return wrapped

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return length, place, projection and, with a projection, the width of its network."""
        values = {
            "num_virtual_tokens": adapter.get("num_virtual_tokens"),
            **placement.adopted_places(adapter, "decoder"),
        }
        if adapter.get("prefix_projection") and has_network:
            values |= {"prefix_projection": True, "encoder_hidden_size": adapter.get("encoder_hidden_size")}
        return values

    def keeps_network(self, settings: PrefixTuningSettings) -> bool:
        """See `Method`."""
        return settings.prefix_projection

    def start_of(self, model: Any, ids: list[int]) -> torch.Tensor:
        """Return keys and values, as PEFT's encoder holds them."""
        return keys_and_values(model.get_base_model(), ids, getattr(model.active_peft_config, placement.NAME, ()))

    def start_of_keys(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """See `Method`."""
        return embeddings_of_pairs(pairs)

    def soft_prompt(self, model: Any) -> SoftPrompt:
        """Return keys and values [1, K, P, E] of each layer, as PEFT puts them into its cache."""
        from open_instruct.model.shared_prefix import SoftPrompt

        length = model.active_peft_config.num_virtual_tokens
        frozen = getattr(model.prompt_encoder[model.active_adapter], "freezes_first", False)
        if hasattr(model.active_peft_config, placement.NAME):
            placed = model.prefixes().items()
            return SoftPrompt(length, placed={at: frozen_first(pairs) if frozen else pairs for at, pairs in placed})
        cache = model.get_prompt(batch_size=1)
        if model.config.is_encoder_decoder:
            cache = cache.self_attention_cache
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        return SoftPrompt(keys_values=frozen_first(pairs) if frozen else pairs, length=length)


def decoder_sizes(model: Any) -> dict[str, int]:
    """Return an encoder–decoder's sizes for PEFT, which would take the encoder's, and heads as wide as D / H."""
    if not model.config.is_encoder_decoder:
        return {}
    from open_instruct.model.placed_prompts import stack_sizes

    num_layers, num_heads, size = stack_sizes(model, "decoder")
    return {"num_layers": num_layers, "num_attention_heads": num_heads, "token_dim": num_heads * size}


def as_peft_reads(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a decoder's keys and values in the order in which PEFT 0.21 gives a prefix to its layers.

    PEFT repeats the list of all layers' keys and values, and gives each layer four in turn, of which the last two, for
    attention to the encoder, are dropped. So layer j gets pair 2j modulo L: where L is even, layers j and j + L/2 share
    one, and every other pair is not used.
    """
    count = len(pairs)
    taken = {2 * layer % count: pair for layer, pair in reversed(list(enumerate(pairs)))}
    return [taken.get(index, pairs[index]) for index in range(count)]


def frozen_first(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values [1, K, P, E] whose gradient does not reach the first token."""
    import torch

    def frozen(part: torch.Tensor) -> torch.Tensor:
        return torch.cat([part[:, :, :1].detach(), part[:, :, 1:]], 2)

    return [(frozen(keys), frozen(values)) for keys, values in pairs]


def keys_and_values(base: PreTrainedModel, ids: list[int], places: Sequence[str] = ()) -> torch.Tensor:
    """Return what a base computes for P tokens, as [P, 2 · L · K · E] in float32: the layout of PEFT's encoder.

    Args:
        base: the model.
        ids: P tokens.
        places: of our own; see `placement.own_places`. The layout is then that of `placed_prompts.flat`.

    Raises:
        InputError: the base keeps no keys and values for each layer.
    """
    from open_instruct.model import placed_prompts

    try:
        if places:
            return placed_prompts.flat(placed_prompts.keys_and_values_at(base, ids, places))
        pairs = cached(base, ids)
        return embeddings_of_pairs(as_peft_reads(pairs) if base.config.is_encoder_decoder else pairs)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(
            f"a prefix can't start from tokens on a {base.config.model_type} model ({one_line(error, 200)}): "
            "use --prefix_init zero"
        ) from error


def embeddings_of_pairs(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return keys and values [1, K, P, E] of each layer as [P, 2 · L · K · E] in float32; see `keys_and_values`."""
    from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values

    length = pairs[0][0].shape[2]
    values: torch.Tensor = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=length)
    return values.float()
