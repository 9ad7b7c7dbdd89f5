"""The ways to compute attention over the segments of a packed row, and the choice among them.

A back end takes `AttentionInputs` and returns [1, T, H, E]. A query sees the shared keys and its own segment's up to
itself; a window counts keys, shared ones included, because these are positions, too.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from open_instruct.errors import InputError, one_line
from open_instruct.model.attention_blocked import blocked
from open_instruct.model.attention_masks import visibility_mask
from open_instruct.model.attention_varlen import flash_kernel, torch_varlen, varlen
from open_instruct.model.shared_prefix import AttentionInputs, Backend, Segments

FLASH_CAPABILITY = (8, 0)  # of the GPUs for which both packages build these kernels: Ampere and newer
MAX_FLASH_HEAD_SIZE = 256
TRIAL_TOLERANCE = 0.05  # relative to the norm; 16 bits round by a hundredth, and wrong masks change tenths


def sdpa(inputs: AttentionInputs) -> torch.Tensor:
    """Compute by PyTorch's fused attention, segment by segment; layers with a soft cap go to `blocked`."""
    if inputs.softcap:
        return blocked(inputs)
    outputs = []
    for start, end, num_shared in inputs.segments.spans():
        queries, keys, values = (tensor[:, :, start:end] for tensor in (inputs.query, inputs.key, inputs.value))
        if num_shared:
            keys = torch.cat([inputs.shared_key[:, :, :num_shared], keys], 2)
            values = torch.cat([inputs.shared_value[:, :, :num_shared], values], 2)
        # `is_causal` is faster than a mask, but aligns the first query with the first key.
        masked = num_shared or (inputs.window and inputs.window < end - start)
        mask = visibility_mask(end - start, keys.shape[2], inputs.window, keys.device) if masked else None
        if on_gpu(keys) and (masked or keys.dtype == torch.float32):
            # Flash takes neither masks nor float32. Of the other kernels of a GPU, the one that never holds all scores
            # takes no grouped heads, and copies of the keys are smaller than the scores.
            groups = queries.shape[1] // keys.shape[1]
            keys, values = (tensor.repeat_interleave(groups, 1) for tensor in (keys, values))
        outputs.append(
            F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=inputs.scale,
                enable_gqa=queries.shape[1] != keys.shape[1],
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on a GPU."""
    return tensor.is_cuda


BACKENDS: dict[str, Backend] = {
    "blocked": blocked,
    "sdpa": sdpa,
    "varlen": torch_varlen,
    "flash_attn": partial(varlen, flash_kernel),
}


@dataclass(frozen=True)
class HeadShape:
    """What a kernel has to know of a model's attention."""

    num_heads: int
    num_key_heads: int
    size: int  # E


def head_shape(config: Any) -> HeadShape | None:
    """Return the shape of a model's heads as its configuration tells; None where layers have different ones.

    Args:
        config: configuration of a causal language model.
    """
    text = config.get_text_config()
    try:
        num_heads = int(getattr(text, "num_attention_heads", None) or 1)
        num_key_heads = int(getattr(text, "num_key_value_heads", None) or num_heads)
        size = int(getattr(text, "head_dim", None) or getattr(text, "hidden_size", num_heads) // num_heads)
    except (ValueError, TypeError, AttributeError, RuntimeError):  # transformers refuses to name one for all layers
        return None
    return HeadShape(num_heads, num_key_heads, size) if min(num_heads, num_key_heads, size) > 0 else None


def missing(name: str, device: torch.device, dtype: torch.dtype, head_size: int | None = None) -> str | None:
    """Return why a back end can't run here, with the remedy, or None if nothing speaks against it.

    Args:
        name: a key of BACKENDS.
        device: where attention is computed.
        dtype: the type in which it is computed.
        head_size: E; None: unknown.
    """
    if name not in ("varlen", "flash_attn"):
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and this run is on {device.type}: use blocked or sdpa"
    if dtype not in (torch.float16, torch.bfloat16):
        base_dtype = str(dtype).removeprefix("torch.")
        return f"it computes in 16 bits, and the base is {base_dtype}: use sdpa, or --dtype bfloat16"
    if torch.cuda.get_device_capability(device) < FLASH_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer: use sdpa"
    if head_size and (head_size > MAX_FLASH_HEAD_SIZE or (name == "varlen" and head_size % 8)):
        return f"it computes no heads of size {head_size}: use sdpa"
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


def backend_names(
    name: str | None, device: torch.device, dtype: torch.dtype, flash: bool = True, head_size: int | None = None
) -> list[str]:
    """Return the names of the back ends to try, the fastest first: all that may run here, or the requested one alone.

    Args:
        name: the requested back end, a key of BACKENDS, or None.
        device: where attention is computed.
        dtype: the type in which it is computed.
        flash: the package flash-attn may be chosen without a request.
        head_size: E; None: unknown.

    Raises:
        InputError: the requested back end can't run here.
    """
    if name:
        if reason := missing(name, device, dtype, head_size):
            raise InputError(f"--attn_backend {name} can't be used: {reason}")
        return [name]
    if device.type == "cpu":
        return ["blocked"]
    names = ("flash_attn", "varlen", "sdpa") if flash else ("varlen", "sdpa")
    return [candidate for candidate in names if missing(candidate, device, dtype, head_size) is None]


def trial(name: str, device: torch.device, dtype: torch.dtype, shape: HeadShape | None) -> str:
    """Compute a little attention and its gradient by a back end, and by the equations; return what is wrong, or "".

    A kernel that was built for another GPU or another torch, or that lacks this head size, shows only when it runs.

    Args:
        name: a key of BACKENDS.
        device: where attention is computed.
        dtype: the type in which it is computed.
        shape: heads of the model; None: of several shapes, in place of which a usual one is tried.
    """
    shape = shape or HeadShape(8, 2, 64)
    generator, lengths, num_shared = torch.Generator().manual_seed(0), (5, 16), 3
    sizes = [(shape.num_heads, sum(lengths)), *2 * [(shape.num_key_heads, sum(lengths))]]
    sizes += 2 * [(shape.num_key_heads, num_shared)]
    values = [torch.randn(1, *size, shape.size, generator=generator) for size in sizes]
    segments = Segments(((0, lengths[0]), (lengths[0], sum(lengths))), 0, num_shared)
    results = []
    try:
        for backend in (BACKENDS[name], blocked):
            tensors = [value.to(device, dtype).requires_grad_() for value in values]
            query, key, value, shared_key, shared_value = tensors
            scale = shape.size**-0.5
            output = backend(AttentionInputs(query, key, value, shared_key, shared_value, segments, scale, None, None))
            results.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), tensors)])
        errors = [(a - b).float().norm() / b.float().norm() for a, b in zip(*results, strict=True)]
        worst = max(error.item() for error in errors)
    except (AssertionError, NameError):
        raise
    except Exception as error:  # a kernel's refusals have many types
        return f"it does not run here: {one_line(error, 200)}"
    return "" if worst < TRIAL_TOLERANCE else f"its results are wrong here, by {worst:.0%}"
