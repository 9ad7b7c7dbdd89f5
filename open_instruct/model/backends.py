"""The ways to compute attention over the segments of a packed row, and the choice among them.

A back end takes `AttentionInputs` and returns [1, T, H, E]. A query sees the shared keys and its own segment's up to
itself; a window counts keys, shared ones included, because these are positions, too.
"""

from __future__ import annotations

import importlib.util
import inspect
from functools import partial

import torch
import torch.nn.functional as F

from open_instruct.errors import InputError
from open_instruct.model.attention_blocked import blocked
from open_instruct.model.attention_masks import visibility_mask
from open_instruct.model.attention_varlen import flash_kernel, torch_varlen, varlen
from open_instruct.model.shared_prefix import AttentionInputs, Backend


def sdpa(inputs: AttentionInputs) -> torch.Tensor:
    """Compute by PyTorch's fused attention, segment by segment; layers with a soft cap go to `blocked`."""
    if inputs.softcap:
        return blocked(inputs)
    outputs = []
    for start, end, num_shared in inputs.segments.spans():
        queries, keys, values = (tensor[:, :, start:end] for tensor in (inputs.query, inputs.key, inputs.value))
        if num_shared:
            keys = torch.cat([inputs.shared_key, keys], 2)
            values = torch.cat([inputs.shared_value, values], 2)
        # `is_causal` is faster than a mask, but aligns the first query with the first key.
        masked = num_shared or (inputs.window and inputs.window < end - start)
        mask = visibility_mask(end - start, keys.shape[2], inputs.window, keys.device) if masked else None
        outputs.append(
            F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=inputs.scale, enable_gqa=True
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


BACKENDS: dict[str, Backend] = {
    "blocked": blocked,
    "sdpa": sdpa,
    "varlen": torch_varlen,
    "flash_attn": partial(varlen, flash_kernel),
}


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a back end can't run here, with the remedy, or None if it can.

    Args:
        name: a key of BACKENDS.
        device: where attention is computed.
        dtype: the type in which it is computed.
    """
    if name not in ("varlen", "flash_attn"):
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and this run is on {device.type}: use blocked or sdpa"
    if dtype not in (torch.float16, torch.bfloat16):
        base_dtype = str(dtype).removeprefix("torch.")
        return f"it computes in 16 bits, and the base is {base_dtype}: use sdpa, or --dtype bfloat16"
    if name == "flash_attn":
        if importlib.util.find_spec("flash_attn"):
            return None
        return "the package flash-attn is not installed: pip install '.[flash]'"
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
            return None
    return (
        f"torch {torch.__version__} lacks a torch.nn.attention.varlen with windows and grouped heads: "
        "update torch, or use sdpa"
    )


def choose_backend(name: str | None, device: torch.device, dtype: torch.dtype, flash: bool = True) -> str:
    """Return the name of the back end to use: the requested one, or else the fastest that runs here.

    Args:
        name: the requested back end, a key of BACKENDS, or None.
        device: where attention is computed.
        dtype: the type in which it is computed.
        flash: the package flash-attn may be chosen without a request.

    Raises:
        InputError: the requested back end can't run here.
    """
    if name:
        if reason := missing(name, device, dtype):
            raise InputError(f"--attn_backend {name} can't be used: {reason}")
        return name
    if device.type == "cpu":
        return "blocked"
    candidates = ("flash_attn", "varlen", "sdpa") if flash else ("varlen", "sdpa")
    return next(candidate for candidate in candidates if missing(candidate, device, dtype) is None)
