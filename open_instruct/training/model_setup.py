"""The base model and the adapter on it: loaded, new or gone on from, whole or without values."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.adapters import folders as adapters
from open_instruct.arguments import FinetuneArguments
from open_instruct.errors import InputError
from open_instruct.methods import METHODS, MethodSettings, ModelFacts, Recipe, model_facts
from open_instruct.model import loading
from open_instruct.training import continuing, engines, packing


def adopt_adapter(a: FinetuneArguments, origins: dict[str, str]) -> None:
    """Take method, size and base from the adapter to go on from, where no flag names them.

    Raises:
        InputError: it can't be read, or contradicts the flags.
    """
    if not a.adapter_name_or_path:
        return
    folder = adapters.read_folder("the adapter", a.adapter_name_or_path)

    def take(name: str, value: Any) -> None:
        if origins.get(name) in ("flag", "config") and getattr(a, name) != value:
            raise InputError(f"--{name} {getattr(a, name)} is not the {value} of {folder.path}: drop the flag")
        setattr(a, name, value)
        origins[name] = "adapter"

    if a.method == "full":
        qlora = bool(folder.trained_on("use_qlora"))
        take("use_qlora" if qlora else f"use_{continuing.method_of(folder)}", True)
        for name in ("load_in_4bit", "load_in_8bit"):
            if folder.trained_on(name) and name not in origins:
                take(name, True)
    if folder.trained_on("model_revision") and not a.model_revision:
        take("model_revision", folder.trained_on("model_revision"))
    continuing.check_method(folder, a.method)
    if folder.num_virtual_tokens and not a.num_virtual_tokens:
        take("num_virtual_tokens", folder.num_virtual_tokens)
    if a.method == "prefix_tuning" and folder.config.prefix_projection and (folder.path / continuing.TRAINED).is_file():
        take("prefix_projection", True)
    if a.method == "p_tuning" or a.prefix_projection:
        take("encoder_hidden_size", folder.config.encoder_hidden_size)
    if a.method in ("lora", "qlora"):
        for name in ("r", "lora_alpha", "lora_dropout"):
            take("lora_rank" if name == "r" else name, getattr(folder.config, name))
    continuing.check(folder, a.method, method_settings(a))
    a.model_name_or_path = adapters.base_name(a.model_name_or_path, [folder])


def load_base(
    a: FinetuneArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Any:
    """The base model on this process's device; where weights are shared out, whole on the main process's CPU, and empty elsewhere."""
    assert a.model_name_or_path
    shared = engines.shares_weights(engines.engine_of(accelerator))
    if shared and not accelerator.is_main_process:
        return skeleton(a, config)
    quantise = quantisation(a)
    with nullcontext() if shared else accelerator.main_process_first():
        model = loading.load_model(
            a.model_name_or_path,
            config,
            base_dtype(a),
            loading.choose_attention(a.use_flash_attn),
            quantise=quantise,
            allow_pickle=a.allow_pickle,
            use_liger_kernel=a.use_liger_kernel,
            revision=a.model_revision,
            trust_remote_code=a.trust_remote_code,
        )
    loading.check_vocabulary(model, tokenizer)
    if Path(a.model_name_or_path).is_dir():
        model.name_or_path = str(Path(a.model_name_or_path).resolve())  # what an adapter records: found from any folder
    return model if quantise or shared else model.to(accelerator.device)


INITS = ("prompt_tuning_init", "prefix_init")


class Bases:
    """Base models for runs that follow each other in one process: each is read once, and taken back unchanged."""

    def __init__(self) -> None:
        """None yet."""
        self.kept: dict[str, tuple[Any, list[float]]] = {}

    def take(
        self,
        a: FinetuneArguments,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ) -> Any:
        """The base that these flags name, for one run at a time."""
        if a.method == "full":  # its weights will be others
            return load_base(a, config, tokenizer, accelerator)
        key = base_key(a)
        if key not in self.kept:
            model = load_base(a, config, tokenizer, accelerator)
            self.kept[key] = model, sums(model)
        return self.kept[key][0]

    def give_back(self, a: FinetuneArguments, model: Any) -> None:
        """Take the adapter off.

        Raises:
            RuntimeError: a frozen weight has changed.
        """
        if a.method == "full":
            return
        base = model.unload() if isinstance(model.base_model, BaseTuner) else model.get_base_model()
        if hasattr(base, "peft_config"):
            del base.peft_config
        if sums(base) != self.kept[base_key(a)][1]:
            raise RuntimeError(f"{METHODS[a.method].title} left other weights in the base than it found there")


def quantisation(a: FinetuneArguments) -> str | None:
    """How the base is quantised: "4bit", "8bit", or None."""
    return "4bit" if METHODS[a.method].needs_quantised_base or a.load_in_4bit else "8bit" if a.load_in_8bit else None


def base_key(a: FinetuneArguments) -> str:
    """What decides which weights a run starts from, and how they are held."""
    names = ("model_name_or_path", "model_revision", "config_name", "additional_model_arguments", "use_liger_kernel")
    return repr([quantisation(a), base_dtype(a), *(getattr(a, name) for name in names)])


def sums(model: Any) -> list[float]:
    """The sum of each parameter."""
    return [parameter.detach().sum(dtype=torch.float64).item() for parameter in model.parameters()]


def base_dtype(a: FinetuneArguments) -> torch.dtype:
    """In which the base is held."""
    return torch.float32 if a.method == "full" else loading.choose_dtype(a.dtype)


def skeleton(a: FinetuneArguments, config: PretrainedConfig) -> Any:
    """The base model without values, on the meta device. Its buffers, which a configuration alone decides, are real."""
    attention = loading.choose_attention(a.use_flash_attn)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=base_dtype(a), attn_implementation=attention, trust_remote_code=a.trust_remote_code
        )
    model.tie_weights()  # the context makes each parameter anew
    model.config.use_cache = False
    return model


def empty_copy(
    a: FinetuneArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tensors: dict[str, torch.Tensor]
) -> Any:
    """The model on the meta device with true values where it was trained: enough to be saved, at no cost in memory."""
    model = wrapped(a, skeleton(a, config), tokenizer)
    problems = model.load_state_dict(tensors, strict=False, assign=True)
    assert not problems.unexpected_keys, problems.unexpected_keys
    causal = packing.base_of(model)
    causal.tie_weights()
    with suppress(OSError):  # many a base has none of its own
        causal.generation_config = GenerationConfig.from_pretrained(a.model_name_or_path, revision=a.model_revision)
    return model


def method_settings(a: FinetuneArguments) -> MethodSettings:
    """The part of the arguments that shapes an adapter."""
    return MethodSettings(**{item.name: getattr(a, item.name) for item in fields(MethodSettings)})


def fill_from_recipe(a: FinetuneArguments, recipe: Recipe, origins: dict[str, str]) -> None:
    """Fill the hyperparameters that the user left unset, and note their origin."""
    if a.learning_rate is None and a.learning_rate_factor != 1:
        a.learning_rate, origins["learning_rate"] = (
            a.learning_rate_factor * recipe.learning_rate,
            f"recipe × {a.learning_rate_factor:g}",
        )
    for item in fields(recipe):
        if item.name == "sources" or getattr(recipe, item.name) is None or getattr(a, item.name) is not None:
            continue
        setattr(a, item.name, getattr(recipe, item.name))
        origins[item.name] = "recipe"


def wrap_method(
    a: FinetuneArguments, model: Any, tokenizer: PreTrainedTokenizerBase, origins: dict[str, str], whole: bool
) -> tuple[Any, Recipe, ModelFacts]:
    """Fill in the recipe and put the adapter on. The same seed gives the same start on every process.

    `whole`: every process holds all weights; else no starts can be tried, and the recipe begins at the text.
    """
    method = METHODS[a.method]
    if a.prompt_tuning_init_text and a.method == "prefix_tuning" and a.prefix_init is None:
        a.prefix_init, origins["prefix_init"] = "text", "flag prompt_tuning_init_text"
    if a.prompt_tuning_init_text and a.method == "prompt_tuning" and a.prompt_tuning_init is None:
        a.prompt_tuning_init, origins["prompt_tuning_init"] = "text", "flag prompt_tuning_init_text"
    facts = engines.told(model_facts(model, tokenizer, method.wants_keys))
    recipe = method.recipe(facts, method_settings(a))
    if not whole:
        texts: dict[str, Any] = {name: "text" for name in INITS if getattr(recipe, name) == "screened"}
        recipe = replace(recipe, **texts)
    fill_from_recipe(a, recipe, origins)
    torch.manual_seed(a.seed)
    return wrapped(a, model, tokenizer), recipe, facts


def wrapped(a: FinetuneArguments, model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The base with a new adapter, or with the one to go on from."""
    method = METHODS[a.method]
    if not a.adapter_name_or_path:
        return method.wrap(model, tokenizer, method_settings(a))
    folder = adapters.read_folder("the adapter", a.adapter_name_or_path)
    return continuing.wrap(folder, method, model, tokenizer, method_settings(a))
