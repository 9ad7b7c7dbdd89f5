"""Attention over the segments of a packed row: one interface, several ways to compute it.

Every back end takes query [1, H, T, E], key and value [1, K, T, E], the shared keys and values [1, K, S, E], `Segments`,
the scale, the sliding window and the soft cap, and returns [1, T, H, E]. A query sees the shared keys and its own
segment's up to itself; a window counts keys, shared ones included, which are positions.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from open_instruct.errors import InputError
from open_instruct.model.shared_prefix import Backend, Segments

BLOCK = (
    256  # queries whose scores exist at once: they stay in the cache of a CPU, and memory does not grow with the square
)
TOGETHER = 128  # tokens up to which short segments are computed in one product, masked from each other: calls cost more than they


@lru_cache(maxsize=256)
def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Mask [num_queries, num_keys] of queries that are the last of the keys: True where a query sees a key."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    seen = keys <= queries
    return seen & (keys > queries - window) if window else seen


@lru_cache(maxsize=256)
def bias(num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`visible` as summand of the scores: 0 where seen, -inf elsewhere."""
    summand = torch.zeros((num_queries, num_keys), dtype=dtype, device=device)
    return summand.masked_fill_(~visible(num_queries, num_keys, window, device), -math.inf)


@lru_cache(maxsize=256)
def own_bias(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Summand [n, n] of the scores of neighbouring segments that don't see each other."""
    summand = torch.full((sum(lengths), sum(lengths)), -math.inf, dtype=dtype, device=device)
    start = 0
    for length in lengths:
        summand[start : start + length, start : start + length] = bias(length, length, None, dtype, device)
        start += length
    return summand


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """PyTorch's fused attention, segment by segment."""
    if softcap:
        return blocked(query, key, value, shared_key, shared_value, segments, scale, window, softcap)
    outputs = []
    for start, end, num_shared in segments.spans():
        keys, values = key[:, :, start:end], value[:, :, start:end]
        if num_shared:
            keys, values = torch.cat([shared_key, keys], 2), torch.cat([shared_value, values], 2)
        masked = num_shared or (window and window < end - start)
        mask = visible(end - start, keys.shape[2], window, query.device) if masked else None
        part = F.scaled_dot_product_attention(
            query[:, :, start:end], keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(part)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Plain matrix products over blocks of queries, recomputed in the backward pass; on CPUs faster than `sdpa`.

    PyTorch's CPU kernel wants a mask here, computes what is masked, copies key heads for grouped queries, and is slow in
    bfloat16 (`benchmarks/RESULTS.md`).
    """
    return _Blocked.apply(query, key, value, shared_key, shared_value, segments, scale, window, softcap)


class _Blocked(torch.autograd.Function):
    """softmax(q kᵀ · scale + mask) v for each block of queries; only the inputs are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, shared_key: Any, shared_value: Any, segments: Any, *settings: Any
    ) -> Any:
        ctx.save_for_backward(query, key, value, shared_key, shared_value)
        ctx.segments, ctx.settings = segments, settings
        num_heads, num_kv = query.shape[1], key.shape[1]
        output = query.new_empty(1, query.shape[2], num_heads, value.shape[-1])
        for start, end, num_shared, lengths in _groups(segments, settings[1]):
            keys, values = _own_and_shared(key, value, shared_key, shared_value, start, end, num_shared)
            for first, last, lowest, own in _blocks(lengths, num_shared, settings[1]):
                queries = query[0, :, start + first : start + last].reshape(num_kv, -1, query.shape[-1])
                weights, _ = _weights(queries, keys[:, lowest : num_shared + last], own, *settings)
                part = torch.bmm(weights, values[:, lowest : num_shared + last])
                output[0, start + first : start + last] = part.view(num_heads, last - first, -1).transpose(0, 1)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        query, key, value, shared_key, shared_value = ctx.saved_tensors
        scale, window, softcap = ctx.settings
        num_kv, shared = key.shape[1], (shared_key.float(), shared_value.float())
        grads = [
            torch.empty_like(query),
            torch.empty_like(key),
            torch.empty_like(value),
            *map(torch.zeros_like, shared),
        ]
        for start, end, num_shared, lengths in _groups(ctx.segments, window):
            keys, values = _own_and_shared(key, value, shared_key, shared_value, start, end, num_shared)
            blocks = _blocks(lengths, num_shared, window)
            grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device) if len(blocks) > 1 else None
            grad_values = (
                torch.zeros(values.shape, dtype=torch.float32, device=keys.device) if len(blocks) > 1 else None
            )
            for first, last, lowest, own in blocks:
                seen = slice(lowest, num_shared + last)
                queries = query[0, :, start + first : start + last].reshape(num_kv, -1, query.shape[-1])
                grad = grad_output[0, start + first : start + last].transpose(0, 1).reshape(num_kv, -1, value.shape[-1])
                weights, capped = _weights(queries, keys[:, seen], own, scale, window, softcap)
                grad_scores = torch.ops.aten._softmax_backward_data(
                    torch.bmm(grad, values[:, seen].transpose(1, 2)), weights, -1, weights.dtype
                )
                if capped is not None:
                    grad_scores = grad_scores * (1 - capped * capped)
                grads[0][0, :, start + first : start + last] = _product(grad_scores, keys[:, seen], scale).view(
                    query.shape[1], last - first, -1
                )
                to_keys = _product(grad_scores.transpose(1, 2), queries, scale)
                to_values = torch.bmm(weights.transpose(1, 2), grad)
                if grad_keys is None or grad_values is None:
                    grad_keys, grad_values = to_keys, to_values
                else:
                    grad_keys[:, seen] += to_keys
                    grad_values[:, seen] += to_values
            assert grad_keys is not None and grad_values is not None
            grads[1][0, :, start:end], grads[2][0, :, start:end] = (
                grad_keys[:, num_shared:],
                grad_values[:, num_shared:],
            )
            if num_shared:
                grads[3][0] += grad_keys[:, :num_shared]
                grads[4][0] += grad_values[:, :num_shared]
        return *grads[:3], grads[3].to(key.dtype), grads[4].to(key.dtype), None, None, None, None


def _own_and_shared(
    key: Any, value: Any, shared_key: Any, shared_value: Any, start: int, end: int, num_shared: int
) -> tuple[Any, Any]:
    """Keys and values [K, S + n, E] that a segment sees."""
    keys, values = key[0, :, start:end], value[0, :, start:end]
    if num_shared:
        return torch.cat([shared_key[0], keys], 1), torch.cat([shared_value[0], values], 1)
    return keys, values


@lru_cache(maxsize=8)
def _groups(segments: Segments, window: int | None) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(start, end, number of shared keys, lengths) of runs of segments that are computed together."""
    groups: list[tuple[int, int, int, tuple[int, ...]]] = []
    for start, end, num_shared in segments.spans():
        if groups:
            first, _, shared, lengths = groups[-1]
            no_window = not window or num_shared + max(*lengths, end - start) <= window
            if shared == num_shared and end - first <= TOGETHER and no_window:
                groups[-1] = (first, end, shared, (*lengths, end - start))
                continue
        groups.append((start, end, num_shared, (end - start,)))
    return groups


def _blocks(
    lengths: tuple[int, ...], num_shared: int, window: int | None
) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(first query, last query + 1, first key that any of them sees, lengths of its segments) of each block of a group."""
    if len(lengths) > 1:
        return [(0, sum(lengths), 0, lengths)]
    ends = [(first, min(first + BLOCK, lengths[0])) for first in range(0, lengths[0], BLOCK)]
    return [
        (first, last, max(0, num_shared + first - window + 1) if window else 0, (last - first,)) for first, last in ends
    ]


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Left @ right · scale, scaled before it is rounded. [K, n, m], [K, m, E] → [K, n, E]."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)


def _weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention weights [K, H/K · n, m] of n queries, in segments of these lengths, the last of m keys; and tanh of capped scores."""
    scores = _product(queries, keys.transpose(1, 2), scale)
    capped = None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores = capped * softcap
    num_queries, num_keys = sum(lengths), keys.shape[1]
    grouped = scores.view(scores.shape[0], -1, num_queries, num_keys)
    if window and window < num_keys and len(lengths) == 1:
        grouped += bias(num_queries, num_keys, window, scores.dtype, scores.device)
    else:  # keys before the block are seen by all of it
        grouped[..., num_keys - num_queries :] += own_bias(lengths, scores.dtype, scores.device)
    return torch.softmax(scores, -1), capped


@lru_cache(maxsize=8)
def varlen_index(
    segments: Segments, from_outside: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Index arithmetic of variable-length attention: each segment's keys are the shared ones and its own, in that order.

    Args:
        segments: of the row.
        from_outside: the shared keys stand before the row's own (prefix tuning), not at the row's head.
        device: of the tensors.

    Returns:
        positions [Σ keys] into the keys (the shared ones from outside, if any, then the row's), cumulative lengths of
        the queries and of the keys [number of segments + 1] (int32), and the longest of each.
    """
    offset = segments.num_shared if from_outside else 0
    positions, num_queries, num_keys = [], [0], [0]
    for start, end, num_shared in segments.spans():
        positions.append(torch.arange(num_shared))
        positions.append(torch.arange(start + offset, end + offset))
        num_queries.append(end - start)
        num_keys.append(num_shared + end - start)
    cumulative = [torch.tensor(n).cumsum(0).int().to(device, non_blocking=True) for n in (num_queries, num_keys)]
    return (
        torch.cat(positions).to(device, non_blocking=True),
        cumulative[0],
        cumulative[1],
        max(num_queries),
        max(num_keys),
    )


def varlen(
    kernel: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared_key: torch.Tensor,
    shared_value: torch.Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """All segments in one call of a variable-length kernel whose causal mask is aligned bottom-right.

    `kernel` takes query [T, H, E], key and value [N, K, E], cumulative lengths of queries and keys, the longest of each, scale,
    window and soft cap, and returns [T, H, E]. The rest is as for every back end.
    """
    outside = segments.num_shared > 0 and segments.num_head == 0
    if outside:
        key, value = torch.cat([shared_key, key], 2), torch.cat([shared_value, value], 2)
    positions, cumulative_queries, cumulative_keys, longest_query, longest_key = varlen_index(
        segments, outside, query.device
    )
    rows = (tensor[0].transpose(0, 1) for tensor in (key, value))
    keys, values = (tensor.index_select(0, positions) if segments.num_shared else tensor for tensor in rows)
    queries = query[0].transpose(0, 1)
    return kernel(
        queries, keys, values, cumulative_queries, cumulative_keys, longest_query, longest_key, scale, window, softcap
    )[None]


def torch_kernel(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, scale: float, window: Any, softcap: Any
) -> Any:
    """`torch.nn.attention.varlen`; it has no soft cap, which `torch_varlen` minds."""
    from torch.nn.attention.varlen import varlen_attn

    assert not softcap
    left = (window - 1) if window else -1
    return varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1]
    )


def flash_kernel(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, scale: float, window: Any, softcap: Any
) -> Any:
    """The flash-attn package, version 2.6 or newer (soft cap; bottom-right since 2.1)."""
    from flash_attn import flash_attn_varlen_func

    left = (window - 1) if window else -1
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
        softcap=softcap or 0.0,
    )


def torch_varlen(
    query: Any,
    key: Any,
    value: Any,
    shared_key: Any,
    shared_value: Any,
    segments: Segments,
    scale: float,
    window: Any,
    softcap: Any,
) -> torch.Tensor:
    """`torch.nn.attention.varlen` (GPU, 16 bits); layers with a soft cap go to `blocked`."""
    rest = (query, key, value, shared_key, shared_value, segments, scale, window, softcap)
    return blocked(*rest) if softcap else varlen(torch_kernel, *rest)


BACKENDS: dict[str, Backend] = {
    "blocked": blocked,
    "sdpa": sdpa,
    "varlen": torch_varlen,
    "flash_attn": partial(varlen, flash_kernel),
}


def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a back end can't run here, with the remedy; None if it can."""
    if name not in ("varlen", "flash_attn"):
        return None
    if device.type != "cuda":
        return f"it needs a GPU, and this run is on {device.type}: use blocked or sdpa"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, and the base is {str(dtype).removeprefix('torch.')}: use sdpa, or --dtype bfloat16"
    if name == "flash_attn":
        return (
            None
            if importlib.util.find_spec("flash_attn")
            else "the package flash-attn is not installed: pip install '.[flash]'"
        )
    if importlib.util.find_spec("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
            return None
    return f"torch {torch.__version__} lacks a torch.nn.attention.varlen with windows and grouped heads: update torch, or use sdpa"


def choose(name: str | None, device: torch.device, dtype: torch.dtype, flash: bool = True) -> str:
    """Name of the back end that was asked for, or of the fastest that runs here; the package flash-attn only if `flash`.

    Raises:
        InputError: the one that was asked for can't run here.
    """
    if name:
        if reason := missing(name, device, dtype):
            raise InputError(f"--attn_backend {name} can't be used: {reason}")
        return name
    if device.type == "cpu":
        return "blocked"
    candidates = ("flash_attn", "varlen", "sdpa") if flash else ("varlen", "sdpa")
    return next(candidate for candidate in candidates if missing(candidate, device, dtype) is None)
