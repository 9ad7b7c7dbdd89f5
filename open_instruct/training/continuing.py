"""Training that goes on from a trained adapter, for every method; PEFT's own `is_trainable=True` refuses soft prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from open_instruct.adapters.folders import WEIGHTS, AdapterFolder, check_shapes
from open_instruct.errors import InputError
from open_instruct.methods.base import Method, MethodSettings

# Which methods can start from which kinds of adapter. Prompt tuning takes P-tuning's vectors, without its network.
STARTS = {
    "lora": ("LORA",),
    "qlora": ("LORA",),
    "ia3": ("IA3",),
    "prompt_tuning": ("PROMPT_TUNING", "P_TUNING"),
    "p_tuning": ("P_TUNING",),
    "prefix_tuning": ("PREFIX_TUNING",),
}
TRAINED = "trained.safetensors"  # beside an adapter whose network (P-tuning, projected prefix) PEFT's format leaves out


def method_of(folder: AdapterFolder) -> str:
    """The method that made an adapter.

    Raises:
        InputError: it is none of ours.
    """
    for name, kinds in STARTS.items():
        if folder.method in kinds and name != "qlora" and not (name == "prompt_tuning" and folder.method == "P_TUNING"):
            return name
    raise InputError(
        f"--adapter_name_or_path {folder.path} is {folder.title}, which can't be trained here: use {', '.join(STARTS)}"
    )


def check_method(folder: AdapterFolder, method: str) -> None:
    """An adapter goes on with the method that made it.

    Raises:
        InputError: another one was chosen.
    """
    if folder.method not in STARTS.get(method, ()):
        raise InputError(
            f"--adapter_name_or_path {folder.path} is {folder.title}, and the method is {method}: drop the method's flag"
        )


def check(folder: AdapterFolder, method: str, settings: MethodSettings) -> None:
    """Refuse what can't go on.

    Raises:
        InputError: another number of virtual tokens, or a network that was not kept.
    """
    if folder.num_virtual_tokens and settings.num_virtual_tokens not in (None, folder.num_virtual_tokens):
        raise InputError(
            f"--num_virtual_tokens {settings.num_virtual_tokens} is not the {folder.num_virtual_tokens} of {folder.path}: drop the flag"
        )
    network = method == "p_tuning" or (method == "prefix_tuning" and settings.prefix_projection)
    if network and not (folder.path / TRAINED).is_file():
        other = "--use_prompt_tuning" if method == "p_tuning" else "without --prefix_projection"
        raise InputError(
            f"{folder.path} does not hold its network ({TRAINED}), which only runs of this project keep: go on with {other}"
        )


def wrap(
    folder: AdapterFolder,
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: MethodSettings,
) -> nn.Module:
    """The base with the adapter, trainable. A base on the meta device gets one without values.

    Raises:
        InputError: the adapter does not fit the base.
    """
    empty = model.device.type == "meta"
    saved = {} if empty else load_file(folder.path / WEIGHTS)
    wrapped: Any
    if not folder.num_virtual_tokens:
        folder.config.inference_mode = False
        wrapped = get_peft_model(model, folder.config)
        if not empty:
            misfit = f"--adapter_name_or_path {folder.path} does not fit the base"
            try:
                problems = set_peft_model_state_dict(wrapped, saved)
            except RuntimeError as error:
                raise InputError(f"{misfit}: {' '.join(str(error).split())[:300]}") from None
            if problems.unexpected_keys:
                raise InputError(f"{misfit}: it has no place for {problems.unexpected_keys[0]}")
        return wrapped
    check_shapes(folder, model)
    wrapped = method.wrap(model, tokenizer, replace(settings, num_virtual_tokens=folder.num_virtual_tokens))
    if empty:
        return wrapped
    with torch.no_grad():
        if (method.name == "p_tuning") or settings.prefix_projection:
            trained = load_file(folder.path / TRAINED)
            problems = wrapped.load_state_dict(trained, strict=False)
            assert not problems.unexpected_keys, problems.unexpected_keys
        elif method.name == "prefix_tuning":
            wrapped.prompt_encoder["default"].load_prompt_embeddings(saved["prompt_embeddings"].float())
        else:
            wrapped.prompt_encoder["default"].embedding.weight.copy_(saved["prompt_embeddings"])
    return wrapped
