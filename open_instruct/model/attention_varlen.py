"""Attention of a packed row in one call of a variable-length flash attention kernel (GPU, 16 bits).

Such a kernel takes sequences of different lengths one after another: sequence i has the queries cu_q[i]:cu_q[i+1] and
the keys cu_k[i]:cu_k[i+1], where cu_q and cu_k are cumulative lengths. The numbers of queries and keys may differ. The
causal mask is then aligned to the bottom right: the last query sees the last key. With the S shared keys put before a
segment's n own, query t (from 0) of the segment sees keys 0 to S + t: all shared ones, and its own up to itself. That
is the mask of `shared_prefix`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from open_instruct.model.attention_blocked import blocked
from open_instruct.model.shared_prefix import AttentionInputs, Segments


class VarlenIndex(NamedTuple):
    """Offsets of each segment's queries and keys for the kernel; names as in flash-attn."""

    key_positions: torch.Tensor  # [Σ keys], into the keys: the shared ones from outside, if any, then the row's
    cu_seqlens_q: torch.Tensor  # [number of segments + 1], int32
    cu_seqlens_k: torch.Tensor  # [number of segments + 1], int32
    max_seqlen_q: int
    max_seqlen_k: int


# Takes queries [T, H, E], keys and values [Σ keys, K, E], the index, scale, window and soft cap; returns [T, H, E].
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, VarlenIndex, float, "int | None", "float | None"], torch.Tensor
]


@lru_cache(maxsize=8)
def varlen_index(segments: Segments, device: torch.device) -> VarlenIndex:
    """Return the index of a row: each segment's keys are the shared ones and its own, in that order.

    Two examples of 3 and 1 tokens behind 2 virtual tokens in the row (num_prefix_tokens = num_shared = 2) give

        segments         virtual | example 1   | example 2
        key positions      0 1   | 0 1 2 3 4   | 0 1 5         the shared keys 0 and 1 are read once for each segment
        cu_seqlens_q     0       2             5           6
        cu_seqlens_k     0       2             7          10

    With 2 keys from outside and no shared tokens in the row, these keys stand before the row's own: positions
    0 1 2 3 4 | 0 1 5 again, of which 0 and 1 are now those from outside. With a hard prompt behind them, it is the
    first segment, which sees those from outside and itself.

    Args:
        segments: the boundaries of the row.
        device: where the tensors are wanted.
    """
    key_positions, query_lengths, key_lengths = [], [0], [0]  # a 0 first: cumulative lengths begin with it
    for start, end, num_shared in segments.spans():
        key_positions.append(torch.arange(num_shared))
        key_positions.append(torch.arange(start, end) + segments.num_outside)
        query_lengths.append(end - start)
        key_lengths.append(num_shared + end - start)
    # Made on the CPU and copied without waiting: nothing here makes the GPU stop.
    return VarlenIndex(
        torch.cat(key_positions).to(device, non_blocking=True),
        torch.tensor(query_lengths).cumsum(0).int().to(device, non_blocking=True),
        torch.tensor(key_lengths).cumsum(0).int().to(device, non_blocking=True),
        max(query_lengths),
        max(key_lengths),
    )


def varlen(kernel: Kernel, inputs: AttentionInputs) -> torch.Tensor:
    """Compute all segments in one call of a variable-length kernel whose causal mask is aligned bottom-right.

    Returns:
        [1, T, H, E]
    """
    segments, key, value = inputs.segments, inputs.key, inputs.value
    if segments.num_outside:
        outside_key, outside_value = (x[:, :, : segments.num_outside] for x in (inputs.shared_key, inputs.shared_value))
        key, value = torch.cat([outside_key, key], 2), torch.cat([outside_value, value], 2)
    index = varlen_index(segments, key.device)
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (inputs.query, key, value))
    if segments.num_shared:
        # Copies the shared keys for every segment. The derivative of index_select adds the copies' gradients up again.
        keys, values = keys.index_select(0, index.key_positions), values.index_select(0, index.key_positions)
    return kernel(queries, keys, values, index, inputs.scale, inputs.window, inputs.softcap)[None]


def torch_kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: VarlenIndex,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Call `torch.nn.attention.varlen`. It has no soft cap, which is why `torch_varlen` sends such layers elsewhere."""
    from torch.nn.attention.varlen import varlen_attn

    assert not softcap
    output = varlen_attn(
        queries,
        keys,
        values,
        index.cu_seqlens_q,
        index.cu_seqlens_k,
        index.max_seqlen_q,
        index.max_seqlen_k,
        scale=scale,
        window_size=_window_size(window),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    assert isinstance(output, torch.Tensor)  # a pair only with return_aux
    return output


def flash_kernel(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: VarlenIndex,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Call the flash-attn package, version 2.6 or newer (soft cap; bottom-right since 2.1)."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        queries,
        keys,
        values,
        index.cu_seqlens_q,
        index.cu_seqlens_k,
        index.max_seqlen_q,
        index.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=_window_size(window),
        softcap=softcap or 0.0,
    )


def _window_size(window: int | None) -> tuple[int, int]:
    """Return (keys to the left of a query's own, keys to its right), as both kernels count; -1 on the left: all."""
    return (window - 1 if window else -1, 0)


def torch_varlen(inputs: AttentionInputs) -> torch.Tensor:
    """Compute by `torch.nn.attention.varlen`; layers with a soft cap go to `blocked`."""
    return blocked(inputs) if inputs.softcap else varlen(torch_kernel, inputs)
