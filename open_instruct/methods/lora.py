"""LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023), and variants of both.

Variants: rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), LoRA+ (Hayou et al. 2024), and the starts of
`lora_start`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError
from open_instruct.flags.lora import starts_from_weights
from open_instruct.methods.base import LayerMethod, Recipe, task_type, trained_in_float32, unusual_linears
from open_instruct.methods.facts import ModelFacts, between
from open_instruct.methods.features import Feature
from open_instruct.methods.lora_start import scale_of_doubled, start_from_weights
from open_instruct.methods.lora_targets import modules_in_full, target_modules

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARDED = "quantised weights can't be sharded: use DDP or ZeRO-2"


# What each variant can't be combined with: conditions on the settings, features, and the reason.
VARIANT_OBSTACLES: tuple[tuple[str, Callable[[Any], bool], tuple[Feature, ...], str], ...] = (
    (
        "--init_lora_weights pissa or olora",
        lambda settings: starts_from_weights(settings.init_lora_weights),
        (Feature.ZERO_3, Feature.FSDP),
        "a part of each matrix stays fixed, which sharded parameters forget: use DDP or ZeRO-2, or another "
        "--init_lora_weights",
    ),
    (
        "--use_dora",
        lambda settings: settings.use_dora,
        (Feature.ZERO_3, Feature.FSDP),
        "DoRA reads the base's weights outside of the modules that gather them: use DDP or ZeRO-2, or drop --use_dora",
    ),
    (
        "--use_dora",
        lambda settings: settings.use_dora,
        (Feature.EIGHT_BITS,),
        "PEFT's DoRA does not run on 8-bit layers (peft 0.21): use --load_in_4bit, or drop --use_dora",
    ),
    (
        "--lora_bias",
        lambda settings: settings.lora_bias != "none",
        (Feature.ZERO_3, Feature.FSDP),
        "trained biases are parameters of sharded layers, whose values in the base would be lost: use DDP or ZeRO-2, "
        "or drop --lora_bias",
    ),
    (
        "--modules_to_save",
        lambda settings: bool(settings.modules_to_save),
        (Feature.ZERO_3, Feature.FSDP),
        "a module that is trained in full has a frozen twin, and only full weights hold both: use DDP or ZeRO-2, or "
        "drop --modules_to_save",
    ),
    (
        "--new_tokens",
        lambda settings: bool(settings.new_tokens),
        (Feature.ZERO_3, Feature.FSDP),
        "their rows are a part of matrices that are sharded as a whole: use DDP or ZeRO-2, or drop --new_tokens",
    ),
)


@dataclass(frozen=True)
class LoraSettings:
    """Size, place, form and start of the update."""

    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: list[str] | None  # None: all linear layers
    lora_layers: list[str] | None  # None: all
    lora_bias: str
    use_rslora: bool
    use_dora: bool
    init_lora_weights: str | None  # None: PEFT's default
    loraplus_ratio: float | None
    modules_to_save: list[str] | None
    new_tokens: list[str] | None


class Lora(LayerMethod):
    """Low-rank updates of linear layers: all of them but the head, where the settings name no others."""

    name, title = "lora", "LoRA"
    settings_class = LoraSettings
    peft_types = continues_from = ("LORA",)
    merges_into = "weights"
    known_to_vllm = True

    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return, for wide models, a rate on which PEFT's method comparison and QLoRA's table agree: 1e-4 to 2e-4."""
        return Recipe(
            learning_rate=between(2e-3, 2e-4, facts.hidden_size),
            warmup_ratio=0.03,
            sources="measured here (hidden size 64 to 128), Dettmers et al. 2023 and PEFT method comparison (2048 and "
            "more)",
        )

    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: LoraSettings) -> nn.Module:
        """Put PEFT's LoRA on the layers that the settings name."""
        from peft import LoraConfig, get_peft_model

        from open_instruct.model.new_tokens import token_ids, trained_rows

        targets = target_modules(model, settings.lora_target_modules, settings.lora_layers)
        rank, alpha, init = settings.lora_rank, settings.lora_alpha, settings.init_lora_weights
        from_weights = starts_from_weights(init)
        if from_weights:
            rank, alpha = 2 * rank, scale_of_doubled(alpha, settings.use_rslora)
        rows = trained_rows(model, token_ids(tokenizer, settings.new_tokens)) if settings.new_tokens else None
        config = LoraConfig(
            task_type=task_type(model),
            r=rank,
            lora_alpha=alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            exclude_modules=(unusual_linears(model) or None) if targets == "all-linear" else None,
            bias=settings.lora_bias,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            init_lora_weights="gaussian" if init == "gaussian" else True,
            modules_to_save=modules_in_full(model, settings.modules_to_save) or None,
            trainable_token_indices=rows,
        )
        wrapped = trained_in_float32(get_peft_model(model, config))
        if settings.lora_bias != "none" and not any(hasattr(p, "of_base") for p in wrapped.parameters()):
            raise InputError(
                f"--lora_bias {settings.lora_bias}: these layers of a {model.config.model_type} model have no biases: "
                "remove it"
            )
        if from_weights:
            assert init
            start_from_weights(wrapped, init, settings.lora_rank)
        return wrapped

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return size, place and form of the update."""
        values = {
            "lora_rank": adapter.get("r", 8),
            "lora_alpha": adapter.get("lora_alpha", 8),
            "lora_dropout": adapter.get("lora_dropout", 0.0),
            "lora_bias": adapter.get("bias", "none"),
            "use_rslora": adapter.get("use_rslora", False),
            "use_dora": adapter.get("use_dora", False),
        }
        for name in ("target_modules", "modules_to_save"):
            if found := adapter.get(name):
                words = [found] if isinstance(found, str) else found
                values["lora_target_modules" if name == "target_modules" else name] = words
        layers = adapter.get("layers_to_transform")
        if layers is not None and layers != []:
            values["lora_layers"] = [str(index) for index in (layers if isinstance(layers, list) else [layers])]
        return values

    def num_numbers(self, model: Any, settings: LoraSettings) -> int:
        """See `Method`."""
        from open_instruct.model.sizes import layer_size, linear_sizes

        targets = target_modules(model, settings.lora_target_modules, settings.lora_layers)
        sizes = linear_sizes(model)
        if targets != "all-linear":
            sizes = [size for name in targets if (size := layer_size(model.get_submodule(name)))]
        rank = settings.lora_rank * (2 if starts_from_weights(settings.init_lora_weights) else 1)
        lengths = sum(outputs for _, outputs in sizes) if settings.use_dora else 0
        names = modules_in_full(model, settings.modules_to_save)
        in_full = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
        return rank * sum(inputs + outputs for inputs, outputs in sizes) + lengths + in_full

    def changes_base(self, settings: Any) -> bool:
        """See `Method`: trained biases are the base's own, and PEFT leaves modules that it trains in their place."""
        return settings.lora_bias != "none" or bool(settings.modules_to_save or settings.new_tokens)

    def obstacles_of(self, settings: Any) -> Mapping[Feature, str]:
        """See `Method`."""
        found = dict(self.obstacles)
        for _, applies, features, reason in VARIANT_OBSTACLES:
            if applies(settings):
                found = dict.fromkeys(features, reason) | found
        return found

    def parameter_groups(self, model: nn.Module, settings: LoraSettings, learning_rate: float) -> list[dict[str, Any]]:
        """See `Method`: with LoRA+ (Hayou et al. 2024, 2402.12354), B has a rate of its own."""
        groups = super().parameter_groups(model, settings, learning_rate)
        if settings.loraplus_ratio is None:
            return groups
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        of_b = [".lora_B." in name or ".lora_embedding_B." in name for name, _ in trained]
        return [
            {"params": [parameter for (_, parameter), is_b in zip(trained, of_b, strict=True) if not is_b]},
            {
                "params": [parameter for (_, parameter), is_b in zip(trained, of_b, strict=True) if is_b],
                "lr": settings.loraplus_ratio * learning_rate,
            },
        ]

    def drops_inputs(self, settings: LoraSettings) -> bool:
        """See `Method`."""
        return settings.lora_dropout > 0


class QLora(Lora):
    """LoRA on a base that is loaded in 4-bit NormalFloat."""

    name, title = "qlora", "QLoRA"
    quantises_base = "4bit"
    obstacles = MappingProxyType(
        {
            Feature.EIGHT_BITS: "its base is held in 4 bits: drop --load_in_8bit, or use --use_lora",
            Feature.ZERO_3: SHARDED,
            Feature.FSDP: SHARDED,
        }
    )
