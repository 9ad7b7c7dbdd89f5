"""Configurations of base models: which ones can be trained here, and changes by --additional_model_arguments."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from open_instruct.errors import InputError, input_faults

FLAG = "--additional_model_arguments"
LOADER_ARGUMENTS = ("attn_implementation", "experts_implementation")  # of from_pretrained, not of the configuration
INSTEAD = {
    "revision": "use --model_revision",
    "dtype": "use --dtype",
    "torch_dtype": "use --dtype",
    "quantization_config": "use --load_in_4bit, --load_in_8bit or --quantisation_config",
    "load_in_4bit": "use --load_in_4bit",
    "load_in_8bit": "use --load_in_8bit",
    "trust_remote_code": "use --trust_remote_code",
    "code_revision": "use --model_revision",
    "use_safetensors": "use --allow_pickle",
    "weights_only": "use --allow_pickle",
    "config": "use --config_name",
    "name_or_path": "use --model_name_or_path",
    "_name_or_path": "use --model_name_or_path",
    "pretrained_model_name_or_path": "use --model_name_or_path",
    "subfolder": "name the folder itself with --model_name_or_path",
    "use_flash_attention_2": "use --use_flash_attn",
    "device_map": "processes and devices are chosen by accelerate launch: see docs/distributed.md",
    "cache_dir": "set the environment variable HF_HOME",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "token": "set the environment variable HF_TOKEN",
    "ignore_mismatched_sizes": "weights have to fit",
    "state_dict": "weights come from --model_name_or_path",
    "key_mapping": "weights come from --model_name_or_path as they are",
}
FIXED = (  # attributes that say what the weights are, or that the trainer sets
    "model_type",
    "architectures",
    "auto_map",
    "is_encoder_decoder",
    "is_decoder",
    "transformers_version",
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
)
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")  # transformers 5 keeps the first two in the third
PAIR_MODELS = ("t5", "mt5", "umt5", "bart", "mbart", "t5gemma", "t5gemma2")  # encoder–decoders of text
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # unless their configuration says otherwise


def check_causal(config: PretrainedConfig, name: str) -> None:
    """Refuse what is no causal language model.

    Raises:
        InputError: an encoder–decoder, an encoder, another kind of model, or one under another family's name.
    """
    remedy = "name a causal language model, such as Llama, Qwen, Gemma or GPT-2, or a T5 or BART"
    with input_faults(f"the configuration of model {name}", remedy):
        reason = not_causal(config)
    if reason:
        raise InputError(f"model {name} can't be trained or used here ({reason}): {remedy}")


def not_causal(config: PretrainedConfig) -> str | None:
    """Return why a configuration does not make a causal language model whose weights it describes, or None."""
    kind, text = config.model_type, config.get_text_config()
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        return None if kind in PAIR_MODELS else f"{kind} is an encoder-decoder of a family that is not known here"
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return None  # the model's own code decides
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"{kind} is no causal language model"
    if kind in ENCODERS and False in (getattr(text, "is_decoder", None), getattr(text, "causal", None)):
        return f"{kind} is an encoder: each token sees those after it"
    written = next(iter(config.architectures or []), None)
    made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    of_others = {names for family, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if family != kind}
    if written in of_others and written not in (made, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)):
        return f"its config.json says model_type {kind}, which makes {made}, but architectures {written}"
    return None


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Return the further arguments of a base model from their JSON text.

    Raises:
        InputError: it is no JSON object of finite numbers, or names what another flag decides.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not finite")

    with input_faults(f"{FLAG} {text}"[:200], "give a JSON object of attributes of the model's config.json"):
        arguments = json.loads(text or "{}", parse_constant=refuse)
        if not isinstance(arguments, dict):
            raise ValueError(f"a {type(arguments).__name__} is no JSON object")
    for name in arguments:
        if name in INSTEAD:
            raise InputError(f"{FLAG} can't set {name}: {INSTEAD[name]}")
        if name in FIXED:
            raise InputError(f"{FLAG} can't set {name}, which belongs to the weights or to the trainer: remove it")
    return arguments


def canonical(text: str | None) -> str | None:
    """Return the text of arguments in one form, so that equal ones compare equal; None where there are none."""
    arguments = parse_arguments(text)
    return json.dumps(arguments, sort_keys=True) if arguments else None


def loader_arguments(text: str | None) -> dict[str, Any]:
    """Return the arguments that are from_pretrained's own, not the configuration's."""
    arguments = parse_arguments(text)
    return {name: value for name, value in arguments.items() if name in LOADER_ARGUMENTS}


def with_arguments(config: PretrainedConfig, text: str | None) -> PretrainedConfig:
    """Return the configuration with further arguments, as if its config.json held them.

    Raises:
        InputError: the configuration has no such attribute, or refuses the value.
    """
    arguments = parse_arguments(text)
    changes = {name: value for name, value in arguments.items() if name not in LOADER_ARGUMENTS}
    if not changes:
        return config
    values = config.to_dict()
    check_known(changes, config, values)
    with input_faults(f"{FLAG} {text}"[:200], f"give values that the configuration of a {config.model_type} accepts"):
        changed = type(config).from_dict(merged(values, changes))
    changed.name_or_path = config.name_or_path
    return changed


def check_known(changes: Mapping[str, Any], config: PretrainedConfig, values: Mapping[str, Any]) -> None:
    """Refuse names that a configuration does not have, also within its parts (`text_config`).

    Raises:
        InputError: naming the nearest known ones.
    """
    known = {name for name in (*values, *config.attribute_map) if not name.startswith("_")} - set(FIXED)
    known |= set(ROPE) if "rope_parameters" in values else set()
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, {*known, *LOADER_ARGUMENTS}, n=1)
            meant = (
                f"did you mean {near[0]}?"
                if near
                else f"see the attributes in the model's config.json ({config.model_type})"
            )
            raise InputError(f"{FLAG} names {name}, which is neither an attribute of this model nor an option: {meant}")
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            check_known(value, part, part.to_dict())


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's values with changes; parts are merged, and the older names of RoPE's values followed.

    Raises:
        ValueError: RoPE's values don't make sense.
    """
    result = dict(values)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(values.get(name), dict) and "model_type" in values[name]
        if is_part:
            result[name] = merged(values[name], value)
        elif name not in ROPE:
            result[name] = value
    rope = values.get("rope_parameters") or {}
    if set(ROPE) & set(changes):
        if any(isinstance(value, dict) for value in rope.values()) and "rope_parameters" not in changes:
            raise ValueError("its layers have several kinds of RoPE: give rope_parameters as config.json has them")
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        new = changes.get("rope_parameters", changes.get("rope_scaling", rope)) or {"rope_type": "default"}
        if not isinstance(new, dict):
            raise ValueError("rope_parameters is not an object")
        result["rope_parameters"] = theta | new
        if "rope_theta" in changes:
            result["rope_parameters"]["rope_theta"] = changes["rope_theta"]
        check_rope(result["rope_parameters"])
    return result


def check_rope(parameters: Mapping[str, Any]) -> None:
    """Refuse values of RoPE that transformers would only warn of, or stumble over when the model is built.

    Raises:
        ValueError: naming one.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, value in parameters.items():
        if isinstance(value, dict):
            check_rope(value)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in ("rope_theta", "factor") and not (is_number and math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}, not a positive number")
        if name in ("rope_type", "type") and value not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_type {value!r} is none of default, {', '.join(ROPE_INIT_FUNCTIONS)}")
