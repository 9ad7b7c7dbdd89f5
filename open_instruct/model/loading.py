"""Base model and tokenizer from a folder or the Hub."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from open_instruct.errors import PANIC, InputError, input_faults, one_line
from open_instruct.files import check_readable
from open_instruct.model.backends import FLASH_CAPABILITY
from open_instruct.model.configuration import check_causal, loader_arguments, with_arguments
from open_instruct.model.fit import INDEX, check_fit, check_index, check_token_ids, try_out
from open_instruct.model.quantised import (
    forget_quantisation,
    loading_configuration,
    other_quantised,
    quantised_layers,
)
from open_instruct.model.sizes import check_sizes
from open_instruct.model.weights import check_finite, scales_of
from open_instruct.small_files import must_be_file

SMALL_FILES = ("*.json", "*.jinja")  # what transformers reads beside the weights


def load_config(name: str, arguments: str | None = None, **options: Any) -> PretrainedConfig:
    """Return the configuration of a causal language model.

    Args:
        name: a folder, or a name on the Hub.
        arguments: value of --additional_model_arguments; None: none.
        options: passed on to `from_pretrained` (revision, trust_remote_code, …).

    Raises:
        InputError: the folder or name holds no causal language model, or the arguments don't fit it.
    """
    check_model_folder(name)
    with readable(f"model {name}"):
        config = AutoConfig.from_pretrained(name, **options)
    check_causal(config, name)
    config = with_arguments(config, arguments)
    check_sizes(config, name)
    return config


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer with a pad token.

    A missing pad token is replaced by another special token, which the loss never sees there. No token is added, so the
    embedding matrix keeps its size and the adapter fits the plain base model.

    Args:
        name: a folder, or a name on the Hub.
        options: passed on to `from_pretrained`.

    Raises:
        InputError: there is no tokenizer, or no fast one.
    """
    check_files(Path(name))
    with readable(f"tokenizer {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, **options)
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {name} has no fast form, which the loss masks need: add its tokenizer.json")
    with readable(f"tokenizer {name}"):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "right"
        try_tokenizer(tokenizer)
    return tokenizer


def try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer in all the ways in which it will be used: a damaged one raises errors at its first use only."""
    encoded = tokenizer(["a b", "ä"], add_special_tokens=False, return_offsets_mapping=True)
    tokenizer(["a b"])
    tokenizer.decode(encoded["input_ids"][0], skip_special_tokens=True)
    max(tokenizer.get_vocab().values())
    if not isinstance(tokenizer.chat_template, str | dict | None):
        raise ValueError(f"its chat template is a {type(tokenizer.chat_template).__name__}, not a text")
    for text in tokenizer.special_tokens_map.values():
        if not isinstance(text, str | list):
            raise ValueError(f"the special token {text!r} is no text")


def check_files(folder: Path) -> None:
    """Refuse a folder in which one of the small files of a model is no file that can be read.

    Raises:
        InputError: naming it.
    """
    names = [name for pattern in SMALL_FILES for name in folder.glob(pattern)] if folder.is_dir() else []
    for path in names:
        with input_faults(str(path), "mend it, or copy it again"):
            must_be_file(path)
            path.open("rb").close()


def check_model_folder(name: str) -> None:
    """Check that an existing path is a model folder, and that a name that looks like a path exists.

    Raises:
        InputError: it is not, or it does not.
    """
    path = Path(name)
    if path.is_dir():
        check_readable(path)
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(f"model folder {name} has no config.json: name the folder that holds the model")
    check_files(path)
    if path.is_file():
        raise InputError(f"model {name} is a file: name the folder that holds it")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"no such model folder: {name}")


def check_weights(name: str, allow_pickle: bool) -> None:
    """Refuse a local folder without complete safetensors, unless it has pickle files and these are allowed.

    Raises:
        InputError: no weights, only pickled ones, an incomplete index, or an adapter beside them.
    """
    path = Path(name)
    if path.is_dir() and (path / INDEX).is_file() and not (path / "model.safetensors").is_file():
        check_index(path / INDEX)
    if (path / "adapter_config.json").is_file():
        raise InputError(f"model folder {name} also holds an adapter, which would be loaded with it: separate them")
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if not pickled:
        raise InputError(f"model folder {name} holds no weights: *.safetensors is needed")
    if not allow_pickle:
        raise InputError(
            f"model folder {name} has its weights only as pickle ({pickled[0]}), and loading one can run code "
            "that is in it: convert it to safetensors, or pass --allow_pickle if you trust its source"
        )


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turn the dozens of errors of loading into one InputError that names what could not be loaded.

    Safetensors, pickle, the Hub and JSON raise errors of their own types. To the user they all mean the same.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        text = one_line(error, 400)
        raise InputError(f"{what} can't be loaded ({text}): check the name, the folder and the network") from error


def choose_dtype(name: str) -> torch.dtype:
    """Return the type of this name; "auto" is bfloat16 where a GPU computes it itself, and float32 elsewhere.

    GPUs before Ampere emulate it, slowly (`torch.cuda.is_bf16_supported` counts that, too).
    """
    if name == "auto":
        native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLASH_CAPABILITY
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


def choose_attention(use_flash_attn: bool | None, dtype: torch.dtype, compute_dtype: torch.dtype) -> str | None:
    """Return the name of FlashAttention-2 where it can run, unless it is switched off, or None.

    None leaves the choice to transformers: SDPA, or plain matrix products for models whose scores SDPA can't compute
    (Gemma 2). The package computes in 16 bits only. A base that is held in float32, as in full fine-tuning, would give
    it float32 wherever no autocast is active, so such a base keeps SDPA; packed rows use the package all the same.

    Args:
        use_flash_attn: True: required; False: switched off; None: used if it is installed and there is a GPU.
        dtype: precision in which the base is held.
        compute_dtype: precision in which it computes.

    Raises:
        InputError: it is required and can't run.
    """
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLASH_CAPABILITY
    available = importlib.util.find_spec("flash_attn") is not None and gpu
    if use_flash_attn and not available:
        raise InputError(
            "--use_flash_attn needs a GPU (Ampere or newer) and the flash extra (pip install '.[flash]'): drop the "
            "flag to use SDPA"
        )
    if use_flash_attn and compute_dtype == torch.float32:
        raise InputError(
            "--use_flash_attn computes in 16 bits, and this run in float32: add --dtype bfloat16, or drop it"
        )
    in_16_bits = dtype in (torch.float16, torch.bfloat16)
    return "flash_attention_2" if available and in_16_bits and use_flash_attn is not False else None


def model_class(config: PretrainedConfig) -> Any:
    """Return what builds a model of a configuration: an encoder–decoder, or a causal language model."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_model(
    name: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    quantise: str | None = None,
    allow_pickle: bool = False,
    use_liger_kernel: bool = False,
    arguments: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return the base model in `dtype`, with weights that fit it and are finite.

    Args:
        name: a folder, or a name on the Hub.
        config: result of `load_config`.
        dtype: type of the weights, and of the products of quantised ones.
        attention: result of `choose_attention`.
        quantise: form of the linear layers, see `flags.quantisation`; None: as the checkpoint has them.
        allow_pickle: weights may be pickled.
        use_liger_kernel: load it with Liger's GPU kernels.
        arguments: value of --additional_model_arguments, which `config` has already; None: none.
        options: passed on to `from_pretrained`.

    Raises:
        InputError: weights missing, left over, pickled, not finite, or of another shape; an extra that is not
            installed.
    """
    check_weights(name, allow_pickle)
    options |= loading_options(attention, arguments)
    loader: Any = model_class(config)
    if use_liger_kernel:
        if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
            raise InputError("--use_liger_kernel needs a GPU and `pip install liger-kernel`: drop the flag")
        loader = importlib.import_module("liger_kernel.transformers").AutoLigerKernelForCausalLM
    quantisation = loading_configuration(quantise, config, dtype, model_class(config).from_config)
    if quantisation is not None:
        options["quantization_config"] = quantisation
        config = copy.deepcopy(config)  # transformers writes the quantisation into it
    if not allow_pickle:
        options["use_safetensors"] = True
    with readable(f"model {name}"):
        model, info = loader.from_pretrained(name, config=config, dtype=dtype, **options)
    check_fit(name, config, model, info, arguments)
    check_token_ids(name, model)
    tensors = (*model.named_parameters(), *scales_of(model))
    half = ", or a --dtype with a larger range, as float16 ends at 65,504" if dtype == torch.float16 else ""
    check_finite(tensors, f"model {name}", f"download it again{half}")
    if arguments:
        what = f"--additional_model_arguments {arguments}"[:200]
        try_out(model, what, "give values that this model can run with", training=True)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the weights at the first evaluation for a kernel that has
        # no derivative: from then on, training would reach the last layers only, without an error.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if getattr(model, "is_quantized", False) and not quantised_layers(model) and not other_quantised(model):
        forget_quantisation(model)  # dequantised when loaded
    model.config.use_cache = False
    return model


def loading_options(attention: str | None, arguments: str | None) -> dict[str, Any]:
    """Return the options of `from_pretrained` that make it report what does not fit instead of passing over it.

    Raises:
        InputError: the attention is chosen twice.
    """
    own = loader_arguments(arguments)
    if attention and own.get("attn_implementation", attention) != attention:
        raise InputError(
            f"--additional_model_arguments chooses the attention {own['attn_implementation']}, and --use_flash_attn "
            f"{attention}: drop one, or pass --use_flash_attn False"
        )
    return {"attn_implementation": attention, **own, "output_loading_info": True, "ignore_mismatched_sizes": True}


def check_fit_early(name: str, config: PretrainedConfig, arguments: str | None, **options: Any) -> None:
    """Check from the files' headers alone, in a second, whether a folder's weights fit.

    The model is built without values. Weights that are quantised or pickled, and the Hub's, are checked when loaded.

    Args:
        name: folder of the base.
        config: result of `load_config`.
        arguments: value of --additional_model_arguments.
        options: passed on to `from_pretrained`.

    Raises:
        InputError: they don't fit.
    """
    folder = Path(name)
    if getattr(config, "quantization_config", None) or not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return
    options |= loading_options(None, arguments) | {"device_map": "meta", "use_safetensors": True}
    with readable(f"model {name}"):
        model, info = model_class(config).from_pretrained(name, config=config, **options)
    check_fit(name, config, model, info, arguments)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every token id has a row of the embedding matrix.

    Raises:
        InputError: some have none.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if not getattr(model, "is_quantized", False) and highest >= rows:
        raise InputError(
            f"the tokenizer ({tokenizer.name_or_path}) has ids up to {highest}, but the model embeds only {rows} "
            "tokens: use the model's own tokenizer"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Return the number of positions that the model was made for, or None where its configuration names none."""
    text = config.get_text_config()
    if getattr(text, "relative_attention_num_buckets", None):  # T5 knows distances only
        return None
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def weights_key(name: str, config: PretrainedConfig) -> str:
    """Return a key that identifies a base model: its name and commit on the Hub, or a hash for a local folder.

    The hash covers the configuration, the sizes of the weight files, and samples spread over them: reading all of a
    large model would take minutes.
    """
    if not Path(name).is_dir():
        commit = getattr(config, "_commit_hash", None)
        return f"{name}@{commit}" if commit else name
    digest = hashlib.sha256(config_key(config).encode())
    for path in weight_files(name):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(1 << 16, size // 256)):
                file.seek(offset)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


def weight_files(name: str) -> list[Path]:
    """Return the files that hold the weights of a local folder: pickled ones only where there are no others."""
    folder = Path(name)
    return sorted(folder.glob("*.safetensors")) or sorted(
        path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )


def config_key(config: PretrainedConfig) -> str:
    """Return a hash of a configuration, without the version of transformers that reads it."""
    values = config.to_diff_dict()
    values.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
