"""Whether a model's files and what was made of them are what its configuration says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from open_instruct.errors import InputError, input_faults
from open_instruct.model.weights import misfit, some_of
from open_instruct.small_files import read_json

INDEX = "model.safetensors.index.json"  # of weights in several files
OF_TEXT_MODEL = re.compile(r"(^|\.)(language_model|text_model)\.|^(model\.)?layers\.\d")  # within other models, too


def check_index(index: Path) -> None:
    """Refuse the index of weights in several files if files are missing, or two of them hold the same weight.

    Raises:
        InputError: naming them.
    """
    what, remedy = f"index of the model's weights {index}", "download the folder again"
    content = read_json(index, what, remedy, 1 << 28)
    with input_faults(what, remedy):
        names = sorted(set(content["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{what} names files outside of its folder ({some_of(outside)}): {remedy}")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise InputError(f"{what} names files that are not there ({some_of(absent)}): {remedy}")
    holder: dict[str, str] = {}
    for name in names:
        with input_faults(f"weights {index.parent / name}", remedy), safe_open(index.parent / name, "pt") as file:
            keys = list(file.keys())
        twice = [key for key in keys if key in holder]
        if twice:
            raise InputError(
                f"weights {some_of(twice)} are in {holder[twice[0]]} and in {name} of {index.parent}: {remedy}"
            )
        holder |= dict.fromkeys(keys, name)


def check_fit(
    name: str, config: PretrainedConfig, model: PreTrainedModel, info: dict[str, Any], arguments: str | None
) -> None:
    """Refuse weights that are not exactly those of the model.

    transformers has dropped what its classes declare as dispensable, and ties what is tied. Of a model of text and
    images, of which only the text model is built, the other parts' weights are left over.

    Args:
        name: folder or repository.
        config: the configuration that was asked for.
        model: the model that was built from it.
        info: transformers' report of loading it.
        arguments: value of --additional_model_arguments.

    Raises:
        InputError: naming three parameters that are missing, left over, or of another shape.
    """
    constants = {key for key, buffer in model.named_buffers() if not buffer.is_floating_point() or "inv_freq" in key}
    unexpected = info["unexpected_keys"]
    if getattr(config, "sub_configs", None):
        unexpected = {key for key in unexpected if OF_TEXT_MODEL.search(key)}
    problem = misfit(info["missing_keys"] - constants, unexpected, info["mismatched_keys"])
    if problem:
        changed = f", or drop --additional_model_arguments {arguments}"[:200] if arguments else ""
        raise InputError(
            f"the weights of model {name} do not fit its configuration ({problem}): give the config.json that belongs "
            f"to the weights, or download the folder again{changed}"
        )


def check_token_ids(name: str, model: PreTrainedModel) -> None:
    """Refuse settings in which the ids that end or pad a text are no numbers: transformers would not.

    Raises:
        InputError: naming one.
    """
    for file, settings in (("config.json", model.config), ("generation_config.json", model.generation_config)):
        for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(settings, key, None)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(item) is int for item in ids):
                raise InputError(f"model {name}: the {key} {str(value)[:80]!r} of its {file} is no number: repair it")


@torch.no_grad()
def try_out(model: Any, what: str, remedy: str, training: bool) -> None:
    """Run a model on three tokens, and leave it in evaluation mode.

    Args:
        model: a base, with or without an adapter.
        what: the input that it came from, as the user knows it.
        remedy: what the user can do.
        training: run it as in training, with dropout.

    Raises:
        InputError: it does not run, or computes what is not finite.
    """
    with input_faults(what, remedy):
        ids = torch.tensor([[0, 1, 2]], device=model.device)
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model.train(training)(input_ids=ids, **more).logits
        if not torch.isfinite(logits).all():
            raise ValueError("the model computes what is not finite")
    model.eval()
