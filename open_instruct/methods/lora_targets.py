"""Which modules of a model LoRA updates, and which are trained in full beside it: found by name or by structure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from open_instruct.errors import InputError
from open_instruct.flags.lora import ALL_LINEAR, ATTENTION, GROUPS_OF_LAYERS, MLP, is_pattern, layer_indices
from open_instruct.limits import PATTERN_SECONDS, evaluating_input
from open_instruct.methods.base import unusual_linears

# What the modules between a decoder layer and its linear layers are called, as attributes or as classes.
KINDS = {ATTENTION: re.compile(r"attn|attention"), MLP: re.compile(r"mlp|ffn|feed_?forward|moe|expert")}
MOST_NAMED = 40  # names of layers in a message


def target_modules(model: Any, words: Sequence[str] | None, layers: Sequence[str] | None) -> list[str] | str:
    """Return PEFT's `target_modules`: "all-linear", or the full names of modules.

    Full names, because PEFT's suffixes and indices of layers would also meet other towers of a model, or the numbers of
    experts.

    Args:
        model: a causal language model, without an adapter.
        words: value of --lora_target_modules.
        layers: value of --lora_layers.

    Raises:
        InputError: a word or an index means nothing in this model, or what can't be updated.
    """
    words = list(words or [ALL_LINEAR])
    if words == [ALL_LINEAR] and not layers:
        return ALL_LINEAR
    wanted: set[str] = set()
    for word in words:
        found = modules_of(model, word)
        if not found:
            raise InputError(
                f"--lora_target_modules {word[:80]}: nothing in this {model.config.model_type} model matches; its "
                f"layers are {layer_names(model)}"
            )
        wanted |= found
    if layers:
        wanted = within_layers(model, wanted, layers)
    check_kinds(model, wanted)
    return sorted(wanted)


def modules_of(model: Any, word: str) -> set[str]:
    """Return the full names of the modules that one value of --lora_target_modules means.

    Raises:
        InputError: it is a regular expression that is none, or that computes for ever.
    """
    if word in GROUPS_OF_LAYERS:
        linear = linear_layers(model)
        return set(linear) if word == ALL_LINEAR else {name for name in linear if part_of_layer(model, name) == word}
    names = [name for name, _ in model.named_modules()]
    if not is_pattern(word):
        return {name for name in names if name == word or name.endswith(f".{word}")}
    with evaluating_input(f"--lora_target_modules {word[:80]!r}", "repair it", PATTERN_SECONDS):
        pattern = re.compile(word)
        matched = {name for name in names if pattern.fullmatch(name)}
    return {name for name in matched if is_layer(model.get_submodule(name))}


def is_layer(module: Any) -> bool:
    """Return whether PEFT can put LoRA on a module."""
    from torch import nn

    return isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"


def linear_layers(model: Any) -> list[str]:
    """Return the full names of a model's linear layers but the head, and but those that return more than a product."""
    from torch import nn

    head, unusual = model.get_output_embeddings(), set(unusual_linears(model))
    return [
        name
        for name, module in model.named_modules()
        if is_layer(module) and not isinstance(module, nn.Embedding) and module is not head and name not in unusual
    ]


def layer_names(model: Any) -> str:
    """Return the last parts of the names of a model's layers, for a message."""
    names = dict.fromkeys(name.rpartition(".")[2] for name, module in model.named_modules() if is_layer(module))
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(list(names)[:MOST_NAMED]) + more


def decoder(model: Any) -> tuple[str, int]:
    """Return the full name of the list of a model's decoder layers, and their number.

    Raises:
        InputError: there is no such list.
    """
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    inside = set(model.get_decoder().modules())  # other towers may have as many layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside:
            return name, count
    raise InputError(
        f"the decoder layers of this {model.config.model_type} model can't be found: name modules with "
        "--lora_target_modules"
    )


def part_of_layer(model: Any, name: str) -> str | None:
    """Return whether a linear layer belongs to the "attention" or the "mlp" of a decoder layer; None: neither.

    The outermost module within the decoder layer whose name or class tells decides. A linear layer that stands
    directly in the decoder layer (OPT's) is one of a feed-forward network.
    """
    layers, _ = decoder(model)
    if not name.startswith(f"{layers}."):
        return None
    index, *parts = name.removeprefix(f"{layers}.").split(".")
    module = model.get_submodule(f"{layers}.{index}")
    for part in parts[:-1]:
        module = getattr(module, part)
        text = f"{part} {type(module).__name__}".lower()
        for kind, pattern in KINDS.items():
            if pattern.search(text):
                return kind
    return MLP if len(parts) == 1 else None


def within_layers(model: Any, names: set[str], layers: Sequence[str]) -> set[str]:
    """Return those of the modules that are in the decoder layers of --lora_layers.

    Raises:
        InputError: the model has no such layer, or a layer has none of the modules.
    """
    prefix, count = decoder(model)
    indices = layer_indices(layers)
    if indices[-1] >= count:
        raise InputError(f"--lora_layers {' '.join(layers)}: the model's layers are 0 to {count - 1}")
    chosen: set[str] = set()
    for index in indices:
        found = {name for name in names if name.startswith(f"{prefix}.{index}.")}
        if not found:
            raise InputError(
                f"--lora_layers {' '.join(layers)}: layer {index} has none of the modules of --lora_target_modules"
            )
        chosen |= found
    return chosen


def check_kinds(model: Any, names: set[str]) -> None:
    """Refuse modules that LoRA can't update.

    Raises:
        InputError: naming one.
    """
    unusual = set(unusual_linears(model))
    for name in sorted(names):
        module = model.get_submodule(name)
        if not is_layer(module) or name in unusual:
            reason = "returns more than a product" if name in unusual else "is no linear layer and no embedding"
            raise InputError(
                f"--lora_target_modules: {name} ({type(module).__name__}) {reason}; the model's layers are "
                f"{layer_names(model)}"
            )


def modules_in_full(model: Any, words: Sequence[str] | None) -> list[str]:
    """Return the full names of the modules that --modules_to_save means.

    Raises:
        InputError: a word means nothing in this model, or what can't be trained in full beside LoRA.
    """
    names = dict(model.named_modules())
    wanted: list[str] = []
    for word in words or ():
        found = [name for name in names if name and (name == word or name.endswith(f".{word}"))]
        if not found:
            children = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names if names[name]._parameters))
            raise InputError(
                f"--modules_to_save {word[:80]}: nothing in this {model.config.model_type} model has that name; there "
                f"are {children[:500]}"
            )
        for name in found:
            reason = unusable(model, name)
            if reason:
                raise InputError(f"--modules_to_save {word[:80]}: {name} ({type(names[name]).__name__}) {reason}")
        wanted += found
    for name in wanted:
        outer = next((other for other in wanted if name.startswith(f"{other}.")), None)
        if outer:
            raise InputError(f"--modules_to_save: {name} lies inside {outer}: name one of them")
    return sorted(set(wanted))


def unusable(model: Any, name: str) -> str | None:
    """Return why a module can't be trained in full beside LoRA, or None."""
    from torch import nn

    module, (layers, _) = model.get_submodule(name), decoder(model)
    parameters = list(module.parameters())
    if not parameters:
        return "has no parameters: name another module"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return "is a list of modules: name one of them"
    if layers.startswith(f"{name}."):
        return "holds all layers of the model: use full fine-tuning, without --use_lora"
    if not all(parameter.is_floating_point() for parameter in parameters):
        return "is quantised: name another module"
    return None
