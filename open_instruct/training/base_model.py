"""Configuration, tokenizer and base model of a run: loaded in full, or built without values."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.adapters.folders import AdapterFolder
from open_instruct.adapters.loaded import chat_template
from open_instruct.data import chat
from open_instruct.errors import InputError, warn
from open_instruct.flags import Flags
from open_instruct.flags.quantisation import BITSANDBYTES, bits_of, form_of_base
from open_instruct.methods import method_of
from open_instruct.model import loading, quantised
from open_instruct.model.configuration import canonical, loader_arguments
from open_instruct.model.fit import try_out
from open_instruct.model.new_tokens import add_new_tokens, grow_vocabulary, sources_of
from open_instruct.model.precision import autocast
from open_instruct.model.prompt_over_lora import PromptOverLora
from open_instruct.model.quantised import stored_quantisation
from open_instruct.model.weights import plain_tensors
from open_instruct.model.without_weights import check_countable, has_weights
from open_instruct.training import engines


@dataclass(frozen=True)
class BaseModelSettings:
    """Which weights a run starts from, and how they are held."""

    name: str
    config_name: str | None
    revision: str | None
    arguments: str | None  # JSON object of further arguments
    dtype: torch.dtype  # precision of the stored weights
    compute_dtype: torch.dtype  # precision in which they are used
    quantise: str | None  # see `flags.quantisation`
    trains_base: bool  # the run changes the base's weights
    use_flash_attn: bool | None
    use_liger_kernel: bool
    allow_pickle: bool
    trust_remote_code: bool
    new_tokens: tuple[str, ...] = ()  # value of --new_tokens
    stored: str | None = None  # JSON of the checkpoint's own quantisation; None where it is not quantised

    @property
    def is_quantised(self) -> bool:
        """Whether the base is quantised, by flags or in its checkpoint."""
        return self.quantise is not None or self.stored is not None

    @property
    def bits(self) -> str | None:
        """Return "4bit" or "8bit" where bitsandbytes holds the base, else None."""
        return bits_of(self.quantise or self.stored)

    @property
    def configured(self) -> str | None:
        """Return the quantisation configuration as JSON; None where other flags say all of it."""
        return None if self.quantise in BITSANDBYTES else self.quantise

    @property
    def as_found(self) -> dict[str, str | None]:
        """Return the flags that name files and folders, with what makes them usable from other folders."""
        return {"config_name": self.config_name, "quantisation_config": self.configured}

    @property
    def key(self) -> str:
        """Key that identifies the weights and how they are held."""
        parts = [self.quantise, self.dtype, self.name, self.revision, self.config_name, canonical(self.arguments)]
        return repr([*parts, self.use_liger_kernel, *self.new_tokens])


def base_model_settings(flags: Flags) -> BaseModelSettings:
    """Return the settings of the base model."""
    method = method_of(flags.method, flags.peft_config)
    assert flags.model_name_or_path is not None  # `check_flags` and `adopt_adapter` ensure it
    bits = method.quantises_base or ("4bit" if flags.load_in_4bit else "8bit" if flags.load_in_8bit else None)
    return BaseModelSettings(
        name=flags.model_name_or_path,
        # An adapter records it, and is used from other folders.
        config_name=absolute(flags.config_name),
        revision=flags.model_revision,
        arguments=flags.additional_model_arguments,
        # Full fine-tuning trains float32 weights, whatever the precision in which it computes.
        dtype=torch.float32 if method.trains_base else loading.choose_dtype(flags.dtype),
        compute_dtype=loading.choose_dtype(flags.dtype),
        quantise=form_of_base(bits, flags.quantisation_config, flags.skip_modules),
        trains_base=method.changes_base(method.settings(asdict(flags))),
        use_flash_attn=flags.use_flash_attn,
        use_liger_kernel=flags.use_liger_kernel,
        allow_pickle=flags.allow_pickle,
        trust_remote_code=flags.trust_remote_code,
        new_tokens=tuple(flags.new_tokens or ()),
    )


@dataclass(frozen=True)
class TokenizerSettings:
    """Tokenizer and chat template."""

    name: str
    revision: str | None
    trust_remote_code: bool
    chat_template_name: str
    add_bos: bool
    makes_pairs: bool = False  # the model is an encoder–decoder
    new_tokens: tuple[str, ...] = ()  # value of --new_tokens


def absolute(name: str | None) -> str | None:
    """Return the full path of a folder; a name on the Hub as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def load_base_config(settings: BaseModelSettings, needs_weights: bool = True) -> PretrainedConfig:
    """Load the base's configuration, and check the weights of a local folder and the attention before any data is read.

    Args:
        settings: of the base.
        needs_weights: False: there may be none, as a dry run needs none.

    Raises:
        InputError: there is no configuration of a causal language model, or no weights that fit it, or only pickled
            ones that are not allowed; or FlashAttention is required and can't run.
    """
    loading.choose_attention(settings.use_flash_attn, settings.dtype, settings.compute_dtype)
    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    config = loading.load_config(settings.config_name or settings.name, settings.arguments, **options)
    stored = stored_quantisation(config)
    if settings.quantise and stored:
        kind = json.loads(stored).get("quant_method")
        raise InputError(
            f"model {settings.name} is quantised already ({kind}), and the flags would quantise it again: drop "
            "--load_in_4bit, --load_in_8bit, --quantisation_config and --skip_modules, and use --use_lora for QLoRA"
        )
    quantised.configuration_of(settings.quantise, settings.dtype)
    if not needs_weights and not has_weights(settings.name, settings.revision):
        check_countable(settings.name, config)
        return config
    loading.check_weights(settings.name, settings.allow_pickle)
    loading.check_fit_early(settings.name, config, settings.arguments, **options)
    return config


def load_base_tokenizer(settings: TokenizerSettings, adapter: AdapterFolder | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the run's chat template. Warn if the adapter was trained with another one."""
    tokenizer = loading.load_tokenizer(
        settings.name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    add_new_tokens(tokenizer, settings.new_tokens)
    if settings.makes_pairs:
        chat.mark_pairs(tokenizer)
    chat.set_chat_template(tokenizer, settings.chat_template_name, settings.add_bos)
    template = chat_template(adapter.path) if adapter else None
    if template not in (None, tokenizer.chat_template):
        start = str(template)[:60]
        warn(f"the adapter was trained with another chat template (it starts with {start!r}): see --chat_template_name")
    return tokenizer


def load_base(
    settings: BaseModelSettings,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Any:
    """Return the base model on this process's device.

    Where weights are sharded, the main process holds the full model on its CPU, and the others a model without values.
    """
    sharded = engines.is_sharded(engines.engine_of(accelerator))
    if sharded and not accelerator.is_main_process:
        return skeleton(settings, config)
    with nullcontext() if sharded else accelerator.main_process_first():
        model = loading.load_model(
            settings.name,
            config,
            settings.dtype,
            loading.choose_attention(settings.use_flash_attn, settings.dtype, settings.compute_dtype),
            quantise=settings.quantise,
            allow_pickle=settings.allow_pickle,
            use_liger_kernel=settings.use_liger_kernel,
            arguments=settings.arguments,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    if settings.new_tokens:
        grow_vocabulary(model, sources_of(tokenizer, settings.new_tokens))
    loading.check_vocabulary(model, tokenizer)
    if Path(settings.name).is_dir():
        model.name_or_path = str(
            Path(settings.name).resolve()
        )  # an adapter records it; absolute, it works from any folder
    if sharded:
        return model
    if not quantised.is_of_bitsandbytes(model):  # which has chosen the device itself
        model = model.to(accelerator.device)
    with autocast(accelerator.device.type, settings.compute_dtype):
        try_out(model, f"model {settings.name}", "repair its config.json, or choose another --dtype", training=False)
    return model


def load_or_count(
    settings: BaseModelSettings,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Any:
    """Return the base model for a dry run: without values, on the meta device, where its weights are not here."""
    if has_weights(settings.name, settings.revision):
        return load_base(settings, config, tokenizer, accelerator)
    with loading.readable(f"model {settings.name}"):  # a configuration may name what its class can't build
        model = skeleton(settings, config)
    loading.check_vocabulary(model, tokenizer)
    return model


def skeleton(settings: BaseModelSettings, config: PretrainedConfig) -> Any:
    """Build the base without values, on the meta device. Its buffers, which the configuration decides, are real."""
    attention = loading.choose_attention(settings.use_flash_attn, settings.dtype, settings.compute_dtype)
    own = {"attn_implementation": attention} | loader_arguments(settings.arguments)
    with init_empty_weights(include_buffers=False):
        model = loading.model_class(config).from_config(
            config, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code, **own
        )
    model.tie_weights()  # the context makes each parameter anew
    model.config.use_cache = False
    return model


class Bases:
    """Keeps base models for successive runs in one process: each is read once, and must come back unchanged."""

    def __init__(self) -> None:
        """Start without any base."""
        self.loaded: dict[str, tuple[Any, list[float]]] = {}  # by key: the model, and the sum of each parameter

    def take(
        self,
        settings: BaseModelSettings,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> Any:
        """Return the base that the settings name, for one run at a time."""
        if settings.trains_base:
            return load_base(settings, config, tokenizer, accelerator)
        if settings.key not in self.loaded:
            model = load_base(settings, config, tokenizer, accelerator)
            self.loaded[settings.key] = model, sums(model)
        return self.loaded[settings.key][0]

    def give_back(self, settings: BaseModelSettings, model: Any) -> None:
        """Take the adapter off a base that `take` returned.

        Raises:
            RuntimeError: a frozen weight has changed.
        """
        if settings.trains_base:
            return
        has_layers = isinstance(model.base_model, BaseTuner) or isinstance(model, PromptOverLora)
        base = model.unload() if has_layers else model.get_base_model()
        if hasattr(base, "peft_config"):
            del base.peft_config
        if sums(base) != self.loaded[settings.key][1]:
            raise RuntimeError(f"training an adapter changed the weights of the base {settings.name}")


def sums(model: Any) -> list[float]:
    """Return the sum of each parameter."""
    parts = (part for parameter in model.parameters() for part in plain_tensors(parameter))
    return [part.double().sum().item() for part in parts]
