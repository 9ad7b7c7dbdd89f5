"""Trained adapters on one base model: loaded, checked against it, switched.

Several adapters of any methods share one base in memory; one is active at a time.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from open_instruct.adapters.base_changes import BaseChanges
from open_instruct.adapters.folders import BASE, CONFIG, REPAIR, WEIGHTS, AdapterFolder, quantisation
from open_instruct.adapters.generation import check_generation
from open_instruct.errors import InputError, input_faults, one_line, warn
from open_instruct.methods import METHODS, PEFT_LAYERS, peft_configuration, placement
from open_instruct.methods.base import embedding_at
from open_instruct.methods.prefix_tuning import decoder_sizes
from open_instruct.model import loading
from open_instruct.model.configuration import parse_arguments
from open_instruct.model.fit import try_out
from open_instruct.model.new_tokens import grow_vocabulary, sources_of
from open_instruct.model.placed_prompts import load_placed, prefix_width
from open_instruct.model.prompt_over_lora import changes_embeddings, has_adapter
from open_instruct.model.quantised import is_of_bitsandbytes
from open_instruct.model.weights import check_tensor_names, misfit, missing_parts, read_tensors


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
        self.loras: dict[str, Any] = {}  # the LoRA of a soft prompt that was trained with one
        plain_first = sorted(folders, key=lambda folder: not (folder.method and folder.method.wants_plain_layers))
        for folder in plain_first:
            if folder.method is None:
                methods = (*METHODS.values(), *PEFT_LAYERS.values())
                known = ", ".join(sorted({kind for method in methods for kind in method.peft_types}))
                raise InputError(
                    f"adapter {folder.name} is {folder.title}, which can't be used here: known are {known}"
                )
            key = self.keys[folder.name] = f"adapter_{len(self.keys)}"
            if folder.lora:
                self.loras[folder.name] = put_on(folder.lora, base, key)
                if changes_embeddings(base, key):
                    raise InputError(
                        f"adapter {folder.name}: its LoRA changes the embeddings of the input, which PEFT reads "
                        "unchanged behind a soft prompt: it can't be used here"
                    )
            self.models[folder.name] = put_on(folder, base, key)
        is_loaded = not any(parameter.is_meta for parameter in base.parameters())
        if is_loaded:
            try_out(
                self.base, f"model {name_of(base)}", "repair its config.json, or use another --dtype", training=False
            )
        for folder in folders:
            remedy = "use another --dtype, or train the adapter anew"
            try_out(self.use(folder.name), f"base + adapter {folder.name}", remedy, training=False)
        self.use(BASE)
        if is_loaded:
            check_generation(self.base, f"model {name_of(base)}")

    def use(self, name: str) -> Any:
        """Make one adapter (or "base") active and return the model to run.

        Raises:
            InputError: there is no adapter of that name.
        """
        if name not in self.models:
            raise InputError(f"no adapter {name!r}: there are {', '.join(self.models)}")
        key = self.keys.get(name, "")
        for module in self.base.modules():
            is_layer = isinstance(module, BaseTunerLayer)
            if not is_layer and not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            belongs = has_adapter(module, key)
            if belongs:  # an AuxiliaryTrainingWrapper is a layer of the base that an adapter replaces
                module.set_adapter(key if is_layer else [key])
            module.enable_adapters(belongs)
            module.requires_grad_(False)
        return self.models[name]


def put_on(folder: AdapterFolder, base: Any, key: str) -> Any:
    """Return the base with an adapter, whose weights are finite, complete, and all in use.

    Args:
        folder: the adapter.
        base: the base.
        key: the adapter's name inside PEFT.

    Raises:
        InputError: it does not fit; both models are named.
    """
    weights = read_weights(folder, base)
    if folder.is_own:
        return load_placed(base, folder.config, weights, key).eval()
    check_patterns(folder, base)
    what = f"adapter {folder.name}, trained on {folder.trained_base or 'another model'},"
    remedy = f"give the base that it was trained on, not {name_of(base)}, or another copy of it"
    with input_faults(what, remedy), needed_packages(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT only warns of what is missing
        model = PeftModel.from_pretrained(base, str(folder.files), adapter_name=key)
        # `from_pretrained` drops the report of what did not fit. Loading again gives it, and costs little.
        report = model.load_adapter(
            str(folder.files), key, key_mapping=getattr(base, "_checkpoint_conversion_mapping", {})
        )
    if not folder.prompt_kind:  # of soft prompts, `read_weights` has compared names
        problem = misfit(missing_parts(model, report.missing_keys), report.unexpected_keys)
        if problem:
            raise InputError(f"{what} does not fit the base {name_of(base)} ({problem}): {remedy}")
    return model.eval()


@contextmanager
def needed_packages(what: str) -> Iterator[None]:
    """Turn a package that an adapter's settings need, and that is not installed, into an InputError.

    Raises:
        InputError: naming it.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{what} needs a package that is not installed ({one_line(error)}): install it") from error


def read_weights(folder: AdapterFolder, base: Any) -> dict[str, torch.Tensor]:
    """Read an adapter's weights.

    Raises:
        InputError: they are damaged or not finite, or are a soft prompt that does not fit the base.
    """
    weights = read_tensors(folder.files / WEIGHTS, f"adapter {folder.name}", "copy the adapter again, or train it anew")
    if folder.prompt_kind:
        check_tensor_names(weights, ["prompt_embeddings"], f"adapter {folder.name}", "give a file that PEFT wrote")
        check_shape(folder, base, tuple(weights["prompt_embeddings"].shape))
    return weights


def check_patterns(folder: AdapterFolder, base: Any) -> None:
    """Refuse regular expressions in an adapter's settings that are none, or on which `re` computes for ever.

    Raises:
        InputError: naming one.
    """
    names = [name for name, _ in base.named_modules()]
    peft_configuration.check_expressions(folder.settings, names, f"adapter {folder.name}: {CONFIG}")


def check_shape(folder: AdapterFolder, base: Any, shape: tuple[int, ...]) -> None:
    """Refuse a soft prompt of another width or depth than the base's, which would fail late, or not at all.

    Embeddings are stored as [P, D]; keys and values as [P, 2 · L · K · E].

    Raises:
        InputError: it does not fit; both models are named.
    """
    config = base.config.get_text_config()
    width = config.hidden_size
    if folder.is_own:
        places = getattr(folder.config, placement.NAME)
        is_prefix = folder.prompt_kind == "keys_values"
        width = prefix_width(base, places) if is_prefix else embedding_at(base, places).weight.shape[1]
    elif folder.prompt_kind == "keys_values" and base.config.is_encoder_decoder:
        sizes = decoder_sizes(base)
        width = 2 * sizes["num_layers"] * sizes["token_dim"]
    elif folder.prompt_kind == "keys_values":
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_hidden_layers * num_heads * head_size
    if shape != (folder.num_virtual_tokens, width):
        raise InputError(
            f"adapter {folder.name} holds {' × '.join(map(str, shape)) or 'one'} numbers "
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


def is_encoder_decoder(name: str, folders: Sequence[AdapterFolder], trust_remote_code: bool = False) -> bool:
    """Return whether a base is an encoder–decoder, by its configuration.

    Raises:
        InputError: it can't be read; or adapters were trained on a model of the other kind.
    """
    changes = shared_changes(folders)
    config = loading.load_config(
        changes.config_name or name, trust_remote_code=trust_remote_code, revision=changes.model_revision
    )
    kind = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    for folder in folders:
        if folder.settings.get("task_type") not in (None, kind):
            raise InputError(
                f"adapter {folder.name} was trained for {folder.settings['task_type']}, and the base {name} is a "
                f"{config.model_type} model, for {kind}: give the base that it was trained on"
            )
    return bool(config.is_encoder_decoder)


def refuse_encoder_decoder(base: Any, what: str) -> None:
    """Refuse a base that a tool can't use.

    Args:
        base: the model.
        what: the tool, as the user knows it.

    Raises:
        InputError: it is an encoder–decoder.
    """
    if base.config.is_encoder_decoder:
        raise InputError(
            f"{what} is for causal language models, and {name_of(base)} is an encoder–decoder: use generate_peft.py or "
            "evaluate_peft.py --file"
        )


def shared_changes(folders: Sequence[AdapterFolder]) -> BaseChanges:
    """Return the flags with which all adapters' base was loaded in training.

    Raises:
        InputError: they differ.
    """
    first = folders[0].base_changes if folders else BaseChanges()
    for folder in folders:
        if not folder.base_changes.same(first):
            raise InputError(
                f"the adapters were trained on different forms of the base ({folders[0].name}: {first.text()}; "
                f"{folder.name}: {folder.base_changes.text()}): use them one at a time"
            )
    return first


def new_tokens_of(folder: AdapterFolder) -> tuple[str, ...]:
    """Return the value of --new_tokens in the run that trained an adapter.

    Raises:
        InputError: the record of the run is damaged.
    """
    entry = folder.record.get("flags", {}).get("new_tokens")
    words = (entry.get("value") if isinstance(entry, dict) else entry) or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        path = folder.path / "run.json"
        raise InputError(f"adapter {folder.name}: {path} can't be used (its new_tokens are {words!r}): {REPAIR}")
    return tuple(words)


def trained_tokens(folder: AdapterFolder) -> list[int]:
    """Return the ids of the tokens whose rows an adapter trains (PEFT's `trainable_token_indices`), sorted."""
    indices = folder.settings.get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    with input_faults(f"adapter {folder.name} ({folder.files / CONFIG})", REPAIR):
        return sorted({int(index) for ids in lists for index in ids})


def grow_for(model: Any, folders: Sequence[AdapterFolder]) -> None:
    """Give a base the rows of new tokens that adapters train, as they were before training.

    Raises:
        InputError: adapters have different new tokens, which one tokenizer can't have, or they can't be added.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    new = [(new_tokens_of(folder), trained_tokens(folder)) for folder in folders]
    new = [(words, [index for index in ids if words or index >= num_rows]) for words, ids in new]
    if not any(ids for _, ids in new):
        return
    first, (words, ids) = folders[0], new[0]
    for folder, other in zip(folders, new, strict=True):
        if other != (words, ids):
            raise InputError(
                f"adapters {first.name} and {folder.name} were trained with different new tokens, and share one "
                "tokenizer here: use them one at a time"
            )
    sources: dict[int, list[int]] = {index: [] for index in ids}
    if words:
        sources = sources_of(loading.load_tokenizer(str(first.path)), words)
    grow_vocabulary(model, sources)


def runnable(text: str | None) -> str | None:
    """Return the arguments of a base without a FlashAttention that was there in training and is not here."""
    arguments = parse_arguments(text)
    attention = str(arguments.get("attn_implementation"))
    if "flash" in attention and loading.choose_attention(None, torch.bfloat16, torch.bfloat16) is None:
        warn(f"the adapter was trained with the attention {attention}, which can't run here: using the default")
        del arguments["attn_implementation"]
    return json.dumps(arguments) if arguments else None


def load_adapted_base(
    name: str,
    dtype: str,
    folders: Sequence[AdapterFolder] = (),
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantised_in_training: str | None = None,
) -> Any:
    """Return the base model as its adapters were trained on it, in evaluation mode.

    Revision, configuration, further arguments and quantisation are theirs. It is on the GPU if there is one.

    Args:
        name: folder or repository of the base.
        dtype: a value of `--dtype`.
        folders: the adapters.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: load weights that exist only as pickle files.
        quantised_in_training: the form of the base, for adapters that don't record it; see `folders.quantisation`.

    Raises:
        InputError: the adapters were trained on different forms of the base, or it can't be loaded.
    """
    changes = shared_changes(folders)
    arguments = runnable(changes.additional_model_arguments)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": changes.model_revision}
    quantise = quantisation(folders, quantised_in_training)
    if changes.config_name and Path(changes.config_name).is_absolute() and not Path(changes.config_name).is_dir():
        raise InputError(
            f"the adapter was trained with the configuration in {changes.config_name} (--config_name), which is not "
            "there: put it back, or change config_name in the adapter's run.json"
        )
    config = loading.load_config(changes.config_name or name, arguments, **options)
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    precision = stored if dtype == "stored" else loading.choose_dtype(dtype)
    attention = loading.choose_attention(None, precision, precision)
    model = loading.load_model(
        name, config, precision, attention, quantise, allow_pickle, arguments=arguments, **options
    )
    grow_for(model, folders)
    if not is_of_bitsandbytes(model):
        model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model.config.use_cache = True
    return model.eval()
