"""Trained adapters on one base model: loaded, checked against it, switched.

Several adapters of any methods share one base in memory; one is active at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.adapters.folders import BASE, WEIGHTS, AdapterFolder, quantisation
from open_instruct.errors import InputError, one_line
from open_instruct.limits import evaluating_input
from open_instruct.methods import METHODS
from open_instruct.model import loading


class Adapters:
    """A base model with adapters by name, of which one at a time is active.

    `models` maps names to what runs: the base itself under "base", a PeftModel for each adapter. Call `use` before
    running one: the layers of LoRA and its kind are part of the shared base and act on every model until they are
    switched off.
    """

    def __init__(self, base: nn.Module, folders: Sequence[AdapterFolder]) -> None:
        """Load the adapters onto the base.

        Raises:
            InputError: an adapter does not fit the base.
        """
        self.base: Any = base
        self.folders = {folder.name: folder for folder in folders}
        self.models: dict[str, Any] = {BASE: base}
        # The names inside PEFT, which allows no dots, and mistakes some names for parts of its own.
        self.keys: dict[str, str] = {}
        plain_first = sorted(folders, key=lambda folder: not (folder.method and folder.method.wants_plain_layers))
        for folder in plain_first:
            if folder.method is None:
                known = ", ".join(sorted({kind for method in METHODS.values() for kind in method.peft_types}))
                raise InputError(
                    f"adapter {folder.name} is {folder.title}, which can't be used here: known are {known}"
                )
            self.keys[folder.name] = f"adapter_{len(self.keys)}"
            check_targets(folder, base)
            check_shapes(folder, base)
            try:
                model = PeftModel.from_pretrained(base, str(folder.path), adapter_name=self.keys[folder.name])
            except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise InputError(
                    f"adapter {folder.name}, trained on {folder.trained_base or 'another model'}, "
                    f"does not fit the base {name_of(base)}: {one_line(error)}"
                ) from None
            self.models[folder.name] = model.eval()
        self.use(BASE)

    def use(self, name: str) -> Any:
        """Make one adapter (or "base") active and return the model to run.

        Raises:
            InputError: there is no adapter of that name.
        """
        if name not in self.models:
            raise InputError(f"no adapter {name!r}: there are {', '.join(self.models)}")
        key = self.keys.get(name, "")
        for module in self.base.modules():
            if isinstance(module, BaseTunerLayer):
                has_adapter = any(key in getattr(module, part) for part in module.adapter_layer_names)
                if has_adapter:
                    module.set_adapter(key)
            elif isinstance(module, AuxiliaryTrainingWrapper):  # a layer of the base that an adapter replaces
                has_adapter = key in module._adapters
                if has_adapter:
                    module.set_adapter([key])
            else:
                continue
            module.enable_adapters(has_adapter)
            module.requires_grad_(False)
        return self.models[name]


def check_targets(folder: AdapterFolder, base: nn.Module) -> None:
    """Refuse regular expressions for layers that are malformed, or search for ever: PEFT matches each layer's name.

    Raises:
        InputError: naming the expression.
    """
    names = [name for name, _ in base.named_modules()]
    for key in ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"):
        expression = folder.settings.get(key)
        if isinstance(expression, str):
            what = f"{key} {expression[:80]!r} of adapter {folder.name}"
            with evaluating_input(what, "give the names of layers, or a regular expression of Python"):
                pattern = re.compile(expression)
                for name in names:
                    pattern.fullmatch(name)


def check_shapes(folder: AdapterFolder, base: Any) -> None:
    """Refuse a soft prompt of another width or depth than the base's, which would fail late, or not at all.

    Embeddings are stored as [P, D]; keys and values as [P, 2 · L · K · E].

    Raises:
        InputError: it does not fit, or can't be read; both models are named.
    """
    if not folder.prompt_kind:
        return
    config = base.config.get_text_config()
    width = config.hidden_size
    if folder.prompt_kind == "keys_values":
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_hidden_layers * num_heads * head_size
    try:
        with safe_open(str(folder.path / WEIGHTS), "pt") as file:
            shape = tuple(file.get_slice("prompt_embeddings").get_shape())
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter {folder.name} ({folder.path}) can't be read: {error}") from None
    if shape != (folder.num_virtual_tokens, width):
        raise InputError(
            f"adapter {folder.name} holds {shape[0]} × {shape[1]} numbers "
            f"for {folder.trained_base or 'another model'}, and the base {name_of(base)} "
            f"needs {folder.num_virtual_tokens} × {width}: "
            "give the base that it was trained on"
        )


def max_length(config: PretrainedConfig, num_virtual_tokens: int = 0) -> int | None:
    """Return how many tokens prompt and answer may have together: the model's positions less the virtual tokens.

    None: the model names no limit.
    """
    context = loading.context_length(config)
    return context and context - num_virtual_tokens


def name_of(base: Any) -> str:
    """Return the name or folder that a model was loaded from, or its class where it was made in memory."""
    return base.config._name_or_path or type(base).__name__


def chat_template(path: Path) -> str | None:
    """Return the chat template that an adapter's folder holds, or None."""
    if not (path / "tokenizer_config.json").is_file():
        return None
    return loading.load_tokenizer(str(path)).chat_template


def tokenizer_for(
    base: str, folders: Sequence[AdapterFolder], trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the first adapter that has one, with the chat template of its training, or the base's."""
    sources = [str(folder.path) for folder in folders if (folder.path / "tokenizer_config.json").is_file()]
    tokenizer = loading.load_tokenizer(sources[0] if sources else base, trust_remote_code=trust_remote_code)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    return tokenizer


def load_adapted_base(
    name: str,
    dtype: str,
    folders: Sequence[AdapterFolder] = (),
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Any:
    """Return the base model in the revision and quantisation on which its adapters were trained, in evaluation mode.

    It is on the GPU if there is one.

    Args:
        name: folder or repository of the base.
        dtype: a value of `--dtype`.
        folders: the adapters.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: load weights that exist only as pickle files.

    Raises:
        InputError: the adapters were trained on different revisions, or the base can't be loaded.
    """
    revisions = {folder.trained_on("model_revision") for folder in folders}
    if len(revisions) > 1:
        raise InputError(
            f"the adapters were trained on different revisions of the base ({', '.join(map(str, revisions))}): "
            "use them one at a time"
        )
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "revision": revisions.pop() if revisions else None,
    }
    quantise = quantisation(folders)
    config = loading.load_config(name, **options)
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    precision = stored if dtype == "stored" else loading.choose_dtype(dtype)
    attention = loading.choose_attention(None)
    model = loading.load_model(name, config, precision, attention, quantise, allow_pickle, **options)
    if not quantise:
        model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config.use_cache = True
    return model.eval()
