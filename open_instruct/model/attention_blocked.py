"""Attention of a packed row by plain matrix products over blocks of queries: what CPUs compute fastest.

PyTorch's own CPU kernel wants a mask here, computes what is masked, copies key heads for grouped queries, and is slow
in bfloat16 (`benchmarks/RESULTS.md`).

Forward, for query i and the keys j that it sees, with scale s, soft cap c, and mask b (0 where seen, -inf elsewhere):

    z_ij = s · q_i·k_j
    a_ij = c · tanh(z_ij / c)               (without a soft cap: z_ij)
    w_ij = exp(a_ij + b_ij) / Σ_m exp(a_im + b_im)
    o_i  = Σ_j w_ij v_j

Backward, with g_i the derivative of the loss by o_i, and d the derivative by what follows it:

    dv_j = Σ_i w_ij g_i
    dw_ij = g_i·v_j
    da_ij = w_ij (dw_ij - Σ_m w_im dw_im)   (the Jacobian of softmax is diag(w) - w wᵀ)
    dz_ij = da_ij (1 - tanh²(z_ij / c))     (without a soft cap: da_ij)
    dq_i = s Σ_j dz_ij k_j
    dk_j = s Σ_i dz_ij q_i

Only the inputs are kept between the two. The weights are computed a second time in the backward pass, block by block:
kept from the forward pass, they would be as large as the square of the row. This is the idea of FlashAttention (Dao et
al. 2022, arXiv:2205.14135) without its tiles of keys: a block's scores fit into the cache of a CPU.

Dimensions beside those of `shared_prefix`: N queries of a block, M keys that a block sees, Q = H/K · N. The H/K query
heads that share a key head stand below each other as Q rows, head by head. So one product serves all of them, and the
sums over i in dk and dv run over all of their queries without further ado.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from open_instruct.model.attention_masks import additive_mask, block_diagonal_mask
from open_instruct.model.shared_prefix import AttentionInputs, Segments

# Queries whose scores exist at once. They stay in the cache of a CPU, and memory grows with the row, not with its
# square.
MAX_QUERIES_PER_BLOCK = 256
# Short neighbouring segments are computed in one product, masked from each other, up to this number of tokens together:
# so far, a call of its own for each of them would cost more than the scores that are computed only to be masked.
MAX_TOKENS_PER_GROUP = 128


class Group(NamedTuple):
    """Neighbouring segments that are computed together: positions start:end of the row."""

    start: int
    end: int
    num_shared: int  # shared keys that each of them sees before its own
    lengths: tuple[int, ...]  # tokens of each segment


class Block(NamedTuple):
    """Queries of a group whose scores exist at once; counted from the group's start, keys from the first shared one."""

    first_query: int
    end_query: int
    first_key: int  # the first that any of the queries sees
    lengths: tuple[int, ...]  # queries of each segment


def blocked(inputs: AttentionInputs) -> torch.Tensor:
    """Compute attention by plain matrix products over blocks of queries, recomputed in the backward pass.

    Args:
        inputs: attention inputs of one layer.

    Returns:
        [1, T, H, E]
    """
    return _BlockedAttention.apply(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.shared_key,
        inputs.shared_value,
        inputs.segments,
        inputs.scale,
        inputs.window,
        inputs.softcap,
    )


class _BlockedAttention(torch.autograd.Function):
    """The equations at the top of the module. Tensors are arguments of their own, as autograd sees no others."""

    @staticmethod
    def forward(
        ctx: Any,
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
        """Return [1, T, H, E]; see `AttentionInputs` for the arguments."""
        ctx.save_for_backward(query, key, value, shared_key, shared_value)
        ctx.segments, ctx.scale, ctx.window, ctx.softcap = segments, scale, window, softcap
        num_heads, num_key_heads = query.shape[1], key.shape[1]
        # Never read before it is written: the blocks of all groups cover the row.
        output = query.new_empty(1, query.shape[2], num_heads, value.shape[-1])
        for group in _groups(segments, window):
            keys, values = _visible_keys_values(key, value, shared_key, shared_value, group)
            for block in _blocks(group, window):
                positions = slice(group.start + block.first_query, group.start + block.end_query)
                visible = slice(block.first_key, group.num_shared + block.end_query)
                queries_KQE = _rows_by_key_head(query[0, :, positions], num_key_heads)
                weights_KQM, _ = _weights(queries_KQE, keys[:, visible], block.lengths, scale, window, softcap)
                output_KQE = torch.bmm(weights_KQM, values[:, visible])
                output[0, positions] = output_KQE.view(num_heads, -1, value.shape[-1]).transpose(0, 1)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        """Return the derivatives by query, key, value, shared_key and shared_value, given [1, T, H, E]."""
        query, key, value, shared_key, shared_value = ctx.saved_tensors
        scale, window, softcap = ctx.scale, ctx.window, ctx.softcap
        num_key_heads = key.shape[1]
        # Each position belongs to one group, which writes its part: no sum, no zeros to start from.
        grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
        # Every segment sees the shared keys, so their derivative is the sum over all segments. In float32: with 8 bits
        # of mantissa, a sum of hundreds of terms loses those that are below 1/256 of it.
        grad_shared_key = torch.zeros_like(shared_key, dtype=torch.float32)
        grad_shared_value = torch.zeros_like(shared_value, dtype=torch.float32)
        for group in _groups(ctx.segments, window):
            keys, values = _visible_keys_values(key, value, shared_key, shared_value, group)
            blocks = _blocks(group, window)
            # The blocks of a long segment share its keys: again a sum, again in float32. A single block needs none,
            # unless a window hides the first shared keys from it, whose derivative is 0.
            grad_keys = grad_values = None
            if len(blocks) > 1 or blocks[0].first_key > 0:
                grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=keys.device)
                grad_values = torch.zeros(values.shape, dtype=torch.float32, device=keys.device)
            for block in blocks:
                positions = slice(group.start + block.first_query, group.start + block.end_query)
                visible = slice(block.first_key, group.num_shared + block.end_query)
                keys_KME, values_KME = keys[:, visible], values[:, visible]
                queries_KQE = _rows_by_key_head(query[0, :, positions], num_key_heads)
                grad_output_KQE = _rows_by_key_head(grad_output[0, positions].transpose(0, 1), num_key_heads)
                weights_KQM, tanh_KQM = _weights(queries_KQE, keys_KME, block.lengths, scale, window, softcap)
                grad_weights_KQM = torch.bmm(grad_output_KQE, values_KME.transpose(1, 2))
                # da = w (dw - Σ w dw) in one pass. Where a key is masked, w and with it da are exactly 0.
                grad_scores_KQM = torch.ops.aten._softmax_backward_data(
                    grad_weights_KQM, weights_KQM, -1, weights_KQM.dtype
                )
                if tanh_KQM is not None:
                    grad_scores_KQM = grad_scores_KQM * (1 - tanh_KQM * tanh_KQM)
                # From here on grad_scores is dz, and the scale is applied where dz meets keys or queries.
                grad_queries_KQE = _scaled_product(grad_scores_KQM, keys_KME, scale)
                grad_query[0, :, positions] = grad_queries_KQE.view(query.shape[1], -1, query.shape[-1])
                grad_keys_KME = _scaled_product(grad_scores_KQM.transpose(1, 2), queries_KQE, scale)
                grad_values_KME = torch.bmm(weights_KQM.transpose(1, 2), grad_output_KQE)
                if grad_keys is None or grad_values is None:
                    grad_keys, grad_values = grad_keys_KME, grad_values_KME
                else:
                    grad_keys[:, visible] += grad_keys_KME
                    grad_values[:, visible] += grad_values_KME
            assert grad_keys is not None and grad_values is not None  # a group has at least one block
            # Keys [K, S + n, E] of the group: the first S are the shared ones, the rest is written where it stands.
            grad_key[0, :, group.start : group.end] = grad_keys[:, group.num_shared :]
            grad_value[0, :, group.start : group.end] = grad_values[:, group.num_shared :]
            if group.num_shared:
                grad_shared_key[0, :, : group.num_shared] += grad_keys[:, : group.num_shared]
                grad_shared_value[0, :, : group.num_shared] += grad_values[:, : group.num_shared]
        # Shared tokens in the row have shared keys that are a slice of `key`: autograd adds their derivative to that of
        # `key`, which by itself holds only what these tokens do to each other.
        no_gradient = (None, None, None, None)  # segments, scale, window, softcap
        return (
            grad_query,
            grad_key,
            grad_value,
            grad_shared_key.to(key.dtype),
            grad_shared_value.to(key.dtype),
            *no_gradient,
        )


def _rows_by_key_head(heads: torch.Tensor, num_key_heads: int) -> torch.Tensor:
    """Put the query heads that share a key head below each other: [H, N, E] → [K, H/K · N, E]."""
    return heads.reshape(num_key_heads, -1, heads.shape[-1])


def _visible_keys_values(
    key: torch.Tensor, value: torch.Tensor, shared_key: torch.Tensor, shared_value: torch.Tensor, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [K, s + n, E] that a group of n tokens sees: its s first shared ones, then its own."""
    keys, values = key[0, :, group.start : group.end], value[0, :, group.start : group.end]
    if group.num_shared:
        shared_keys, shared_values = shared_key[0, :, : group.num_shared], shared_value[0, :, : group.num_shared]
        return torch.cat([shared_keys, keys], 1), torch.cat([shared_values, values], 1)
    return keys, values


@lru_cache(maxsize=8)
def _groups(segments: Segments, window: int | None) -> list[Group]:
    """Return the segments in groups: short neighbours with the same shared keys, none of which a window cuts."""
    groups: list[Group] = []
    for start, end, num_shared in segments.spans():
        if groups:
            last = groups[-1]
            uncut = not window or num_shared + max(*last.lengths, end - start) <= window
            if last.num_shared == num_shared and end - last.start <= MAX_TOKENS_PER_GROUP and uncut:
                groups[-1] = Group(last.start, end, num_shared, (*last.lengths, end - start))
                continue
        groups.append(Group(start, end, num_shared, (end - start,)))
    return groups


def _blocks(group: Group, window: int | None) -> list[Block]:
    """Return the blocks of a group: one of several segments, or as many as a single segment needs."""
    num_queries = group.end - group.start
    if len(group.lengths) > 1:
        return [Block(0, num_queries, 0, group.lengths)]
    blocks = []
    for first in range(0, num_queries, MAX_QUERIES_PER_BLOCK):
        end = min(first + MAX_QUERIES_PER_BLOCK, num_queries)
        # Query `first` is key S + first. A window leaves it this key and the window - 1 before it.
        first_key = max(0, group.num_shared + first - window + 1) if window else 0
        blocks.append(Block(first, end, first_key, (end - first,)))
    return blocks


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return left @ right · scale, scaled before it is rounded to 16 bits. [K, n, m], [K, m, E] → [K, n, E]."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)


def _weights(
    queries_KQE: torch.Tensor,
    keys_KME: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attention weights [K, Q, M] of a block, and tanh(z / c) of the same shape if scores are capped.

    Args:
        queries_KQE: the block's N queries of all heads.
        keys_KME: the keys that the block sees; its own N are the last.
        lengths: queries of each segment in the block, N together.
        scale: s
        window: number of keys that a query sees, or None.
        softcap: c, or None.
    """
    scores_KQM = _scaled_product(queries_KQE, keys_KME.transpose(1, 2), scale)
    tanh_KQM = None
    if softcap:
        tanh_KQM = torch.tanh(scores_KQM / softcap)
        scores_KQM = tanh_KQM * softcap
    num_queries, num_keys = sum(lengths), keys_KME.shape[1]
    # A view [K, H/K, N, M]: the mask is the same for all heads, and adding it here changes scores_KQM in place.
    by_head = scores_KQM.view(scores_KQM.shape[0], -1, num_queries, num_keys)
    if window and window < num_keys and len(lengths) == 1:
        by_head += additive_mask(num_queries, num_keys, window, by_head.dtype, by_head.device)
    else:  # all queries see all keys before the block, so that only its own keys need a mask
        by_head[..., num_keys - num_queries :] += block_diagonal_mask(lengths, by_head.dtype, by_head.device)
    return torch.softmax(scores_KQM, -1), tanh_KQM
