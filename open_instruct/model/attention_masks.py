"""Masks of attention, kept on their device for the next layer, in a bounded number of bytes.

All layers of a micro-batch want the same few masks, so they are worth keeping. Their number does not bound their
memory: at 4,096 tokens a mask has 17 MB, and lengths differ from row to row.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import ParamSpec

import torch

MAX_CACHED_BYTES = 64 << 20  # a device

Parameters = ParamSpec("Parameters")


class TensorCache:
    """Tensors by key; those that were not used for longest are dropped when together they exceed `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._tensors: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()  # on GPUs, autograd recomputes checkpointed layers in a thread of its own

    def get(self, key: Hashable, build: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the tensor of this key, built if it is not kept. One that alone exceeds the bound is never kept."""
        with self._lock:
            if key in self._tensors:
                self._tensors.move_to_end(key)
                return self._tensors[key]
        tensor = build()
        with self._lock:
            if key not in self._tensors and tensor.nbytes <= self.max_bytes:
                self._tensors[key] = tensor
                self.num_bytes += tensor.nbytes
                while self.num_bytes > self.max_bytes:
                    self.num_bytes -= self._tensors.popitem(last=False)[1].nbytes
        return tensor


CACHES: dict[torch.device, TensorCache] = {}


def cached_on_device(build: Callable[Parameters, torch.Tensor]) -> Callable[Parameters, torch.Tensor]:
    """Keep the tensors that a function builds, in the cache of the device, which is its last argument."""

    @wraps(build)
    def lookup(*args: Parameters.args, **kwargs: Parameters.kwargs) -> torch.Tensor:
        device = args[-1]
        assert isinstance(device, torch.device) and not kwargs, "give all arguments by position, the device last"
        cache = CACHES.setdefault(device, TensorCache(MAX_CACHED_BYTES))
        return cache.get((build.__name__, *args), lambda: build(*args, **kwargs))

    return lookup


def visible_keys(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return the mask [num_queries, num_keys], True where a query sees a key; the queries are the last of the keys."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)[None]
    causal = keys <= queries
    return causal & (keys > queries - window) if window else causal


visibility_mask = cached_on_device(visible_keys)


@cached_on_device
def additive_mask(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return the same mask as a summand of the scores: 0 where a query sees a key, -inf elsewhere."""
    summand = torch.zeros((num_queries, num_keys), dtype=dtype, device=device)
    return summand.masked_fill_(~visible_keys(num_queries, num_keys, window, device), -math.inf)


@cached_on_device
def block_diagonal_mask(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the summand [Σ lengths, Σ lengths] of the scores of neighbouring segments that don't see each other.

    It is causal within each segment and -inf between them.
    """
    summand = torch.full((sum(lengths), sum(lengths)), -math.inf, dtype=dtype, device=device)
    start = 0
    for length in lengths:
        own = summand[start : start + length, start : start + length]
        own.masked_fill_(visible_keys(length, length, None, device), 0.0)
        start += length
    return summand
