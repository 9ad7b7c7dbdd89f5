"""The interface of a fine-tuning method, which every module of this package implements.

Facts about methods are needed before anything heavy is imported, so torch and PEFT are imported inside the functions
that use them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from open_instruct.errors import InputError, one_line
from open_instruct.methods import placement
from open_instruct.methods.facts import ModelFacts
from open_instruct.methods.features import Feature

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from open_instruct.model.shared_prefix import SoftPrompt


# A decoder never read anything before its answers: on a T5 the longer the prompt, the worse the start (measured here).
MAX_BEFORE_DECODER = 2


@dataclass(frozen=True)
class Recipe:
    """Recommended hyperparameters, each used only where the user set none. `sources` says where they come from."""

    learning_rate: float
    warmup_ratio: float
    sources: str
    init: str | None = None  # of a soft prompt: value of the method's `init_flag`
    lora_learning_rate_ratio: float | None = None  # where LoRA is trained beside a soft prompt
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    clip_grad_norm: float = 1.0

    def values(self, init_flag: str | None, sharded: bool) -> dict[str, Any]:
        """Return the values by the names of their flags.

        Args:
            init_flag: flag of the soft prompt's start, or None.
            sharded: no process can compare starts, so a screened start uses the text.
        """
        values = {
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.lr_scheduler_type,
            "warmup_ratio": self.warmup_ratio,
            "weight_decay": self.weight_decay,
            "clip_grad_norm": self.clip_grad_norm,
        }
        if self.lora_learning_rate_ratio is not None:
            values["lora_learning_rate_ratio"] = self.lora_learning_rate_ratio
        if init_flag:
            values[init_flag] = "text" if sharded and self.init == "screened" else self.init
        return values


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none of its own."""


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter whose training continues, as read from its folder."""

    config: PeftConfig
    weights: Mapping[str, torch.Tensor] | None  # None on the meta device, which has no values
    network: Mapping[str, torch.Tensor] | None  # what PEFT's format leaves out; None where `keeps_network` is false


class Method(ABC):
    """One way to fine-tune, with everything that the trainer knows about it. `METHODS` in this package lists them all.

    A method's flags are declared in `flags/method.py`; the fields of its `settings_class` have the flags' names.
    """

    name: str
    title: str
    settings_class: type = NoSettings
    peft_types: tuple[str, ...] = ()  # PEFT types of the adapters that it makes
    continues_from: tuple[str, ...] = ()  # PEFT types of the adapters whose training it can continue
    trains_base = False  # the base's own weights are trained, so there is no adapter
    quantises_base: str | None = None  # "4bit": the method loads the base that way by itself
    prompt_kind: str | None = None  # a soft prompt consists of "embeddings" or "keys_values"; None: no soft prompt
    trains_prompt_directly = False  # the soft prompt's own numbers are the trained parameters
    max_virtual_tokens = 0  # upper bound of the recipe's prompt length
    max_virtual_tokens_of_pairs = 0  # the same for encoder–decoders; 0: as for others
    init_flag: str | None = None  # flag that chooses how the soft prompt starts
    network_remedy = ""  # flags to use instead if the file that `keeps_network` requires is missing
    wants_keys = False  # its recipe needs the spread of the base's keys
    wants_plain_layers = False  # PEFT finds its layers only where no other adapter has wrapped them
    probed_away_from_start = False  # noise on its parameters, which start as nothing, shows whether packing is exact
    memory_kind = "layers"  # key of `model.memory.KEPT`
    merges_into: str | None = None  # a plain checkpoint's "weights", "tokens", or both; None: it can't be merged
    causal_only = False  # it is refused for encoder–decoders
    known_to_vllm = False  # vLLM puts its adapters on a base by itself
    configuration: Mapping[str, Any] | None = None  # fields of the file that chose the method, where one did
    obstacles: Mapping[Feature, str] = MappingProxyType({})

    @property
    def is_soft_prompt(self) -> bool:
        """Whether virtual tokens stand before every example."""
        return self.prompt_kind is not None

    def settings(self, values: Mapping[str, Any]) -> Any:
        """Return an instance of `settings_class` from the values of flags."""
        return self.settings_class(**{item.name: values[item.name] for item in fields(self.settings_class)})

    def recommended_virtual_tokens(
        self,
        context: int | None,
        max_seq_length: int | None,
        makes_pairs: bool = False,
        places: Sequence[str] | None = None,
    ) -> int:
        """Return the length of a soft prompt in tokens: longer ones learn faster, so as long as is useful and fits.

        Args:
            context: positions of the model; None: unlimited.
            max_seq_length: tokens that the user wants for a conversation; None: at most an eighth of the context goes
                to the prompt.
            makes_pairs: the model is an encoder–decoder.
            places: where the soft prompt stands in it; None: where PEFT puts it.
        """
        bound = (makes_pairs and self.max_virtual_tokens_of_pairs) or self.max_virtual_tokens
        if places and self.prompt_kind == "embeddings" and "decoder" in places:
            bound = MAX_BEFORE_DECODER
        if context is None:
            return bound
        return max(1, min(bound, context - max_seq_length if max_seq_length else context // 8))

    @abstractmethod
    def recipe(self, facts: ModelFacts, values: Mapping[str, Any]) -> Recipe:
        """Return hyperparameters for a base with these facts and these values of the method's flags (None: unset)."""

    @abstractmethod
    def wrap(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Any) -> nn.Module:
        """Return the base with a float32 adapter that is the only trainable part.

        A base on the meta device gets an adapter without values.
        """

    def wrap_trained(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Any,
        adapter: TrainedAdapter,
    ) -> nn.Module:
        """Return the base with a trained adapter whose training continues.

        Args:
            model: the base.
            tokenizer: the base's tokenizer.
            settings: an instance of `settings_class`, as for `wrap`.
            adapter: the trained adapter.

        Raises:
            InputError: the weights do not fit.
        """
        raise NotImplementedError(f"{self.title} makes no adapter")

    def adopt(self, adapter: Mapping[str, Any], has_network: bool) -> dict[str, Any]:
        """Return the values of this method's flags that an adapter decides.

        Args:
            adapter: content of its adapter_config.json.
            has_network: whether the file that `keeps_network` describes is beside it.
        """
        return {}

    def flags_of(self, folder: Path) -> dict[str, Any]:
        """Return the flags that choose this method for the adapter in a folder."""
        return {f"use_{self.name}": True}

    def num_numbers(self, model: Any, settings: Any) -> int:
        """Return how many numbers a new adapter has, where flags could ask for more than a machine holds; else 0."""
        return 0

    def keeps_network(self, settings: Any) -> bool:
        """Whether a network computes the soft prompt, which PEFT's format leaves out and further training needs."""
        return False

    def drops_inputs(self, settings: Any) -> bool:
        """Whether dropout on the layers' inputs takes memory."""
        return False

    def changes_base(self, settings: Any) -> bool:
        """Whether a run with these settings leaves its base with other weights, so that no later run can use it."""
        return self.trains_base

    def obstacles_of(self, settings: Any) -> Mapping[Feature, str]:
        """Return the features that can't be combined with the method under these settings, and why."""
        return self.obstacles

    def parameter_groups(self, model: nn.Module, settings: Any, learning_rate: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups; options that a group lacks come from the run.

        Args:
            model: base with adapter.
            settings: an instance of `settings_class`.
            learning_rate: the run's rate, for groups whose rate is a multiple of it.
        """
        return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]

    def further_rates(self, settings: Any, learning_rate: float) -> dict[str, float]:
        """Return, by what is printed, the rates of `parameter_groups` that are not the run's own."""
        return {}

    def soft_prompt(self, model: Any) -> SoftPrompt | None:
        """Return the differentiable soft prompt that the wrapped model puts before every example, or None."""
        return None

    def prompt_vectors(self, model: Any) -> torch.Tensor | None:
        """Return the soft prompt [P, D] as it is now, on the CPU, where it is made of embeddings."""
        return None

    def init_candidates(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: Any, num_candidates: int
    ) -> list[torch.Tensor]:
        """Return candidate values of the soft prompt's parameter to start from; only for methods with an `init_flag`.

        The first is the value that `wrap` gave it, from a text; the others are those of random tokens.
        """
        from open_instruct.model.tokens import random_tokens

        first = model.prompt_encoder["default"].embedding.weight.detach().clone()
        draws = [random_tokens(tokenizer, settings.num_virtual_tokens) for _ in range(num_candidates - 1)]
        return [first, *(self.start_of(model, ids) for ids in draws)]

    def start_of(self, model: Any, ids: list[int]) -> torch.Tensor:
        """Return the values of the soft prompt's parameter for P tokens; only for methods with an `init_flag`."""
        raise NotImplementedError(f"{self.title} does not start from tokens")

    def start_of_keys(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """Return the values of the soft prompt's parameter for keys and values [1, K, P, E]; None where it has none."""
        return None

    def set_init(self, model: Any, values: torch.Tensor) -> None:
        """Start from one of `init_candidates`."""
        import torch

        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(values)


class LayerMethod(Method):
    """A method whose adapter is in the base's layers."""

    def wrap_trained(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Any,
        adapter: TrainedAdapter,
    ) -> nn.Module:
        """See `Method`: PEFT restores the weights."""
        from peft import get_peft_model, set_peft_model_state_dict

        adapter.config.inference_mode = False
        wrapped = trained_in_float32(get_peft_model(model, adapter.config))
        if adapter.weights is None:
            return wrapped
        try:
            problems = set_peft_model_state_dict(wrapped, dict(adapter.weights))
        except RuntimeError as error:
            raise InputError(one_line(error)) from None
        check_loaded(wrapped, problems)
        return wrapped


class EmbeddingPrompt(Method):
    """A method whose soft prompt consists of embeddings."""

    prompt_kind = "embeddings"
    memory_kind = "soft prompt"
    merges_into = "tokens"

    def soft_prompt(self, model: Any) -> SoftPrompt:
        """Return the embeddings [P, D] from PEFT's own encoder."""
        from open_instruct.model.shared_prefix import SoftPrompt

        config = model.active_peft_config
        embeddings = model.get_prompt(batch_size=1)[0]
        return SoftPrompt(embeddings=embeddings, length=len(embeddings), in_decoder=hasattr(config, placement.NAME))

    def prompt_vectors(self, model: Any) -> torch.Tensor:
        """See `Method`."""
        import torch

        with torch.no_grad():
            return model.get_prompt(batch_size=1)[0].detach().float().cpu()


def task_type(model: Any) -> Any:
    """Return PEFT's name for what a model does."""
    from peft import TaskType

    return TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM


def embedding_sizes(model: Any, places: Sequence[str] = ()) -> dict[str, int]:
    """Return the sizes that PEFT's prompts of embeddings need where each stack has a configuration of its own.

    PEFT finds none there. Only the first is used.
    """
    if getattr(model.config, "decoder", None) is None:
        return {}
    size = int(embedding_at(model, places).weight.shape[1])
    return {"token_dim": size, "num_layers": 1, "num_attention_heads": 1}


def embedding_at(base: Any, places: Sequence[str] = ()) -> Any:
    """Return the embeddings of the input before which a soft prompt stands; see `placement.own_places`."""
    return (base.get_decoder() if places else base).get_input_embeddings()


def unusual_linears(model: Any) -> list[str]:
    """Return the names of a model's own kinds of linear layers, such as the routers of Llama 4 and PhiMoE.

    They return more than a product, which PEFT's "all-linear" does not expect.
    """
    from torch import nn

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    ]


def trained_in_float32(wrapped: Any) -> Any:
    """Hold trained parameters in float32, those that belong to the base or were copied from it as well.

    The base's own (biases) keep their value in `of_base`, so that the base can be computed while they are trained.
    """
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if name.endswith(".bias") and not any(part in name for part in (".lora_", ".modules_to_save.")):
                parameter.of_base = parameter.detach().clone()
    return wrapped


def load_network(wrapped: nn.Module, network: Mapping[str, torch.Tensor]) -> None:
    """Restore the trained parameters of a soft prompt's network.

    Raises:
        InputError: some are missing, or have no place.
    """
    try:
        problems = wrapped.load_state_dict(dict(network), strict=False)
    except RuntimeError as error:
        raise InputError(one_line(error)) from None
    check_loaded(wrapped, problems)


def check_loaded(wrapped: nn.Module, problems: Any) -> None:
    """Refuse weights that were not exactly those of an adapter.

    Args:
        wrapped: the base with the adapter, whose parameters alone are trained.
        problems: torch's report: names in the model that got no value, and names that have no place in it.

    Raises:
        InputError: naming three parameters.
    """
    from open_instruct.model.weights import misfit, missing_parts

    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    problem = misfit(trained & set(missing_parts(wrapped, problems.missing_keys)), problems.unexpected_keys)
    if problem:
        raise InputError(f"its weights do not fit: {problem}")
