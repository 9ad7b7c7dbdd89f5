"""Soft prompts of encoder–decoders where PEFT puts none: embeddings before the decoder's input, or keys and values.

A prefix of keys and values stands before those of the encoder's self-attention, of the decoder's, or of the decoder's
attention to the encoder. Every query sees it, whatever its window, and at no distance: T5's bias is 0, and positions
stay as they are without it. Embeddings before the decoder's input are tokens like any other, so positions move.

Dimensions: P virtual tokens, D hidden size, K key/value heads, E head size, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModelForSeq2SeqLM,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    set_peft_model_state_dict,
)

from open_instruct.methods.placement import OWN_TYPES, PEFT_TYPES
from open_instruct.model.pair_attention import PLACED, Pair, kinds_of

Sizes = tuple[int, int, int]  # layers, K, E


class _Placed:
    """What our configurations have beyond PEFT's: a type that PEFT refuses by name."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `adapter_config.json` holds."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return {**values, "peft_type": OWN_TYPES[values["peft_type"]]}


@dataclass
class PlacedPrefixConfig(_Placed, PrefixTuningConfig):
    """A prefix, and where it stands."""

    soft_prompt_at: list[str] = field(default_factory=list)


@dataclass
class DecoderPromptConfig(_Placed, PromptTuningConfig):
    """Embeddings before the decoder's input."""

    soft_prompt_at: list[str] = field(default_factory=lambda: ["decoder"])


@dataclass
class DecoderPromptEncoderConfig(_Placed, PromptEncoderConfig):
    """P-tuning's embeddings before the decoder's input."""

    soft_prompt_at: list[str] = field(default_factory=lambda: ["decoder"])


CONFIGS: dict[str, type[PeftConfig]] = {
    "PREFIX_TUNING": PlacedPrefixConfig,
    "PROMPT_TUNING": DecoderPromptConfig,
    "P_TUNING": DecoderPromptEncoderConfig,
}


def config_of(settings: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration that an `adapter_config.json` of one of our own types holds.

    Raises:
        TypeError: a value has the wrong type.
    """
    kind = CONFIGS[PEFT_TYPES[settings["peft_type"]]]
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in names and name != "peft_type"})


def stack_sizes(model: Any, place: str) -> Sizes:
    """Return (layers, K, E) of the attention at a place; across, keys have the decoder's heads."""
    stack = "encoder" if place == "encoder" else "decoder"
    config = getattr(model.config, stack, None) or model.config
    config = getattr(config, "text_config", None) or config
    num_heads = getattr(config, f"{stack}_attention_heads", None) or config.num_attention_heads
    size = getattr(config, "d_kv", None) or getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_layers = getattr(config, f"{stack}_layers", None)
    if stack == "decoder":
        num_layers = getattr(config, "num_decoder_layers", None) or num_layers
    return (
        num_layers or config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or num_heads,
        size,
    )


def prefix_width(model: Any, places: Sequence[str]) -> int:
    """Return how many numbers one virtual token has at these places together."""
    return sum(2 * layers * heads * size for layers, heads, size in (stack_sizes(model, place) for place in places))


def flat(pairs: Sequence[Pair]) -> torch.Tensor:
    """Return keys and values [1, K, P, E] as [P, n] in float32, in an adapter's order: place, layer, keys, values."""
    return torch.cat([part[0].transpose(0, 1).flatten(1) for pair in pairs for part in pair], 1).float()


def unflat(values: torch.Tensor, sizes: Sequence[Sizes]) -> list[list[Pair]]:
    """Return for each place its layers' keys and values [1, K, P, E]; see `flat`."""
    result, start = [], 0
    for layers, heads, size in sizes:
        end = start + 2 * layers * heads * size
        parts = values[:, start:end].view(len(values), 2 * layers, heads, size).permute(1, 2, 0, 3)[:, None]
        result.append([(parts[2 * layer], parts[2 * layer + 1]) for layer in range(layers)])
        start = end
    return result


class PlacedPromptModel(PeftModelForSeq2SeqLM):
    """An encoder–decoder with a soft prompt of one of our own types; else PEFT's model."""

    def __init__(self, model: Any, peft_config: PeftConfig, adapter_name: str = "default", **options: Any) -> None:
        """See PEFT."""
        peft_config.base_model_name_or_path = peft_config.base_model_name_or_path or model.name_or_path
        super().__init__(model, peft_config, adapter_name, **options)
        self.kinds: dict[Any, str] = {}

    def prefixes(self) -> dict[str, list[Pair]]:
        """Return for each place its layers' keys and values [1, K, P, E], in the base's precision."""
        config, name, base = self.active_peft_config, self.active_adapter, self.get_base_model()
        encoder, places = self.prompt_encoder[name], config.soft_prompt_at
        weight = encoder.embedding.weight
        tokens = self.prompt_tokens[name][: config.num_virtual_tokens]  # PEFT has as many again, for a second stack
        values = weight if config.inference_mode else encoder(tokens.to(weight.device))
        pairs = unflat(values.to(base.dtype), [stack_sizes(base, place) for place in places])
        return dict(zip(places, pairs, strict=True))

    @property
    def is_prefix(self) -> bool:
        """Whether the soft prompt consists of keys and values."""
        return isinstance(self.active_peft_config, PlacedPrefixConfig)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Let the base's attention see the prefix.

        Raises:
            CannotPack: not all of its attention can be reached.
        """
        base = self.get_base_model()
        self.kinds = self.kinds or kinds_of(base)
        own, layers = base.config._attn_implementation, prefixes_by_layer(self.kinds, self.prefixes())
        base.set_attn_implementation(PLACED)
        try:
            for module, pair in layers.items():
                module.placed_prefix = pair
            yield
        finally:
            for module in layers:
                del module.placed_prefix
            base.set_attn_implementation(own)

    def forward(self, **inputs: Any) -> Any:
        """Return the base's output behind the soft prompt; the logits [B, T, V] are the real tokens' only.

        Args:
            inputs: those of the base; for embeddings `decoder_input_ids` is among them, and labels are not.
        """
        if self.is_prefix:
            with self.placed():
                return self.get_base_model()(**inputs)
        output = self.get_base_model()(**self.behind_prompt(inputs))
        output.logits = output.logits[:, self.active_peft_config.num_virtual_tokens :]
        return output

    def behind_prompt(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's inputs with the virtual tokens before those of the decoder."""
        rest = dict(inputs)
        ids, mask = rest.pop("decoder_input_ids"), rest.get("decoder_attention_mask")
        embedded = self.get_base_model().get_decoder().get_input_embeddings()(ids)
        prompt = self.get_prompt(batch_size=len(ids)).to(embedded.dtype)
        if mask is not None:
            rest["decoder_attention_mask"] = torch.cat([mask.new_ones(prompt.shape[:2]), mask], 1)
        return {**rest, "decoder_inputs_embeds": torch.cat([prompt, embedded], 1)}

    def generate(self, **inputs: Any) -> Any:
        """Return the base's answers behind the soft prompt."""
        base = self.get_base_model()
        if self.is_prefix:
            with self.placed():
                return base.generate(**inputs)
        own = base.prepare_inputs_for_generation

        def prepare(*args: Any, **others: Any) -> dict[str, Any]:
            prepared: dict[str, Any] = own(*args, **others)
            return self.behind_prompt(prepared) if others.get("is_first_iteration") else prepared

        base.prepare_inputs_for_generation = prepare
        try:
            return base.generate(**inputs)
        finally:
            del base.prepare_inputs_for_generation


def prefixes_by_layer(kinds: Mapping[Any, str], prefixes: Mapping[str, Sequence[Pair]]) -> dict[Any, Pair]:
    """Return the prefix of each attention that has one."""
    found: dict[Any, Pair] = {}
    for place, pairs in prefixes.items():
        found |= zip((module for module, kind in kinds.items() if kind == place), pairs, strict=True)
    return found


def keys_and_values_at(base: Any, ids: Sequence[int], places: Sequence[str]) -> list[Pair]:
    """Return what a base computes at these places for P tokens that encoder and decoder read: [1, K, P, E] each."""
    kinds: dict[Any, str] = {**kinds_of(base)}
    own, seen = base.config._attn_implementation, dict[Any, Pair]()
    row = torch.tensor([list(ids)], device=base.device)
    base.set_attn_implementation(PLACED)
    try:
        for module in kinds:
            module.seen_keys_values = seen
        with torch.no_grad():
            base(input_ids=row, decoder_input_ids=row, use_cache=False)
    finally:
        for module in kinds:
            del module.seen_keys_values
        base.set_attn_implementation(own)
    return [seen[module] for place in places for module, kind in kinds.items() if kind == place]


def load_placed(base: Any, config: PeftConfig, weights: Mapping[str, torch.Tensor], name: str) -> PlacedPromptModel:
    """Return a base with a trained soft prompt."""
    config.inference_mode = True
    model = PlacedPromptModel(base, config, adapter_name=name)
    set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    return model
