"""Quantised bases: how they are loaded, which of their layers are quantised, and what weights these stand for."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.quantizers.base import get_keys_to_not_convert

from open_instruct.errors import InputError, input_faults
from open_instruct.flags.lora import NAME
from open_instruct.flags.quantisation import BITSANDBYTES, FLAG, skip_key, title_of
from open_instruct.model.weights import some_of

# Kernels for these have no backward pass, or need a GPU, so a checkpoint's weights are dequantised when loaded.
DEQUANTISED = ("fp8", "mxfp8", "mxfp4", "compressed-tensors")
ROWS_AT_ONCE = 4096  # of the identity matrix by which a layer's weights are found
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stored_quantisation(config: PretrainedConfig) -> str | None:
    """Return a checkpoint's own quantisation configuration as JSON; None where it is not quantised."""
    own = getattr(config, "quantization_config", None)
    if not own:
        return None
    values = own if isinstance(own, dict) else own.to_dict()
    return json.dumps(values, sort_keys=True, default=str)


def configuration_of(form: str | None, dtype: torch.dtype) -> Any:
    """Return transformers' object of a form of the base (see `flags.quantisation`); None of None.

    Args:
        form: the form.
        dtype: type of the products of 4-bit weights, where the form names none.

    Raises:
        InputError: transformers can't use it, a package is missing, or a value would be ignored.
    """
    if form is None:
        return None
    values: dict[str, Any] = dict(BITSANDBYTES[form]) if form in BITSANDBYTES else json.loads(form)
    values.setdefault("quant_method", "bitsandbytes")
    method = values["quant_method"]
    if method == "bitsandbytes":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("a quantised base needs bitsandbytes: pip install '.[quant]', or load it without")
        if values.get("load_in_4bit"):
            values.setdefault("bnb_4bit_compute_dtype", str(dtype).removeprefix("torch."))
    remedy = "install its package, or give a configuration as transformers writes it; see docs/quantised.md"
    with input_faults(f"{FLAG} of {method}", remedy):
        try:
            configuration = AutoQuantizationConfig.from_dict(dict(values))
        except (ImportError, AssertionError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        known = {*inspect.signature(type(configuration).__init__).parameters, *configuration.to_dict(), "quant_method"}
        if unknown := set(values) - known:
            raise ValueError(f"it has no {some_of(unknown)}: known are {', '.join(sorted(known - {'self', 'kwargs'}))}")
    return configuration


def loading_configuration(form: str | None, config: PretrainedConfig, dtype: torch.dtype, build: Any) -> Any:
    """Return the `quantization_config` with which a base is loaded, or None.

    Modules that a form names as skipped are skipped besides transformers' own choice, which would be replaced. Weights
    of a checkpoint that can't be trained through as they are stored are dequantised.

    Args:
        form: form of the base that flags ask for; see `flags.quantisation`.
        config: the base's configuration.
        dtype: type of the products of 4-bit weights.
        build: makes a model of a configuration.

    Raises:
        InputError: see `configuration_of`.
    """
    stored = stored_quantisation(config)
    if form is None and stored is not None:
        method = json.loads(stored).get("quant_method")
        if method not in DEQUANTISED:
            return None
        with input_faults(f"the quantization_config of the model ({method})", f"pip install {method}"):
            try:
                own = AutoQuantizationConfig.from_dict({**json.loads(stored), "dequantize": True})
            except ImportError as error:
                raise ValueError(str(error)) from error
        own.dequantize = True
        return own
    configuration = configuration_of(form, dtype)
    key = configuration and skip_key(str(getattr(configuration.quant_method, "value", configuration.quant_method)))
    if key and getattr(configuration, key, None):
        with init_empty_weights():
            model = build(config)
        named = getattr(configuration, key)
        skipped = {*named, *get_keys_to_not_convert(model), *modules_named(model, named)}
        setattr(configuration, key, sorted(skipped))
    return configuration


def modules_named(model: nn.Module, words: Iterable[str]) -> list[str]:
    """Return the full names of the modules that words name by their last parts: transformers' ways match differently.

    Raises:
        InputError: a word names none.
    """
    names = [name for name, _ in model.named_modules()]
    found = []
    for word in words:
        ends = [name for name in names if f".{name}".endswith(f".{word}")]
        if not ends and NAME.fullmatch(word) and not any(word in name for name in names):
            last = sorted({name.rpartition(".")[2] for name in names if name.endswith(("proj", "head", "gate"))})
            raise InputError(f"--skip_modules {word}: the model has no such module: name one as {', '.join(last)}")
        found += ends
    return found


def is_of_bitsandbytes(model: Any) -> bool:
    """Return whether bitsandbytes holds a model: it can't be moved, and is on its device already."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def is_quantised(tensor: Any) -> bool:
    """Return whether a weight is held in another form than plain numbers."""
    values = tensor.detach()
    return values.dtype not in FLOATS or hasattr(values, "__tensor_flatten__")


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers that hold no plain weights, by name: those with `in_features` and no plain `weight`."""
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
            continue
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or is_quantised(weight):
            found[name] = module
    return found


def other_quantised(model: nn.Module) -> list[str]:
    """Return the names of quantised weights outside of linear layers, as those of fused experts."""
    inside = {id(part) for layer in quantised_layers(model).values() for part in layer.parameters()}
    return [name for name, value in model.named_parameters() if id(value) not in inside and is_quantised(value)]


def dequantised_weight(layer: Any) -> torch.Tensor:
    """Return the weights [outputs, inputs] that a quantised linear layer stands for, in the type of its products.

    bitsandbytes and tensors of their own types say it themselves. Any other layer is a linear map, so that what it
    makes of the identity matrix is its weights and its bias.
    """
    weight = getattr(layer, "weight", None)
    if state := getattr(weight, "quant_state", None):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)  # type: ignore[union-attr]
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(layer, "state", None), "SCB", None)
    if scales is not None and isinstance(weight, torch.Tensor):
        return weight.data.float() * scales.float()[:, None] / 127
    if isinstance(weight, torch.Tensor) and hasattr(weight.detach(), "__tensor_flatten__"):
        values: Any = weight.detach()
        return values.dequantize()
    return weight_by_identity(layer)


@torch.no_grad()
def weight_by_identity(layer: Any) -> torch.Tensor:
    """Return the weights [outputs, inputs] of a linear map, from what it makes of zeros and of the identity matrix."""
    anything: torch.Tensor = next(iter((*layer.parameters(), *layer.buffers())))
    bias = getattr(layer, "bias", None)
    scales = (value for value in (*layer.parameters(), *layer.buffers()) if value.dtype in FLOATS)
    dtype = bias.dtype if bias is not None else next((value.dtype for value in scales), torch.float32)
    size, columns = layer.in_features, []
    zero = layer(torch.zeros(1, size, dtype=dtype, device=anything.device))
    for start in range(0, size, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, size), device=anything.device)
        columns.append(layer(nn.functional.one_hot(rows, size).to(dtype)) - zero)
    return torch.cat(columns).T.contiguous()


def dequantised(model: Any) -> Any:
    """Return a quantised model as one of plain weights: its quantised layers replaced by what they stand for.

    Raises:
        InputError: it has quantised weights outside of linear layers, for which this is not known.
    """
    if is_of_bitsandbytes(model):
        return model.dequantize()
    if others := other_quantised(model):
        raise InputError(f"the base's weights {some_of(others)} can't be dequantised: use the adapter as it is")
    dtype = model.get_input_embeddings().weight.dtype
    for name, layer in quantised_layers(model).items():
        weight = dequantised_weight(layer).to(dtype)
        bias = getattr(layer, "bias", None)
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    forget_quantisation(model)
    return model


def forget_quantisation(model: Any) -> None:
    """Take off a model the marks of a quantised one, so that it is moved and saved as the plain one that it is."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def whole_parts(model: Any) -> Iterator[str]:
    """Yield the names of matrices that a quantised model holds in 16 or 32 bits, embeddings apart."""
    embeddings = {id(part) for part in model.get_input_embeddings().parameters()}
    layers = quantised_layers(model)
    for name, value in model.named_parameters():
        inside = any(name.startswith(f"{layer}.") for layer in layers)
        if value.ndim > 1 and not is_quantised(value) and not inside and id(value) not in embeddings:
            yield name


def describe_quantised(model: Any, form: str | None, stored: str | None) -> str:
    """Return one line on what of a quantised base is quantised, and what is whole.

    Args:
        model: the base.
        form: form of the base that flags ask for, or None.
        stored: JSON of the checkpoint's own quantisation, or None.
    """
    count, whole = len(quantised_layers(model)), list(whole_parts(model))
    fused = [name for name in whole if dict(model.named_parameters())[name].ndim == 3]
    parts = [f"{count:,} linear layers quantised"] if count else ["dequantised when loaded"]
    plain = [name for name in whole if name not in fused]
    if count and plain:
        parts.append(f"whole are {some_of(plain)}")
    if count and fused:
        bits = 8 * dict(model.named_parameters())[fused[0]].element_size()
        parts.append(f"experts in one tensor stay in {bits} bits ({some_of(fused)})")
    if others := other_quantised(model):
        parts.append(f"{len(others):,} other weights quantised")
    return f"{title_of(form or stored)}: {'; '.join(parts)}"
