"""Sizes that a configuration or a flag asks for, against what can be built: checked before anything is allocated."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from open_instruct.errors import InputError

# The largest values that are taken for sizes; released models stay far below.
LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "head_dim": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
    "n_positions": 10**9,
    "num_local_experts": 10**5,
    "num_experts": 10**5,
}
BYTES_TRAINED = 8  # at least, of a trained number: itself and its gradient, in float32; AdamW wants more


def check_sizes(config: PretrainedConfig, name: str) -> None:
    """Refuse a configuration whose sizes are no positive whole numbers, or beyond anything that could be built.

    Raises:
        InputError: naming the size.
    """
    text = config.get_text_config()
    for key, largest in LARGEST.items():
        value = getattr(text, key, None)
        if value is not None and (type(value) is not int or not 0 < value <= largest):
            raise InputError(
                f"model {name}: {key} {str(value)[:40]!r} of its config.json is no whole number up to {largest:,}: "
                "download the file again"
            )


def check_memory(num_numbers: int, what: Any, device: torch.device) -> None:
    """Refuse an adapter that this machine can't hold.

    Args:
        num_numbers: numbers of the adapter.
        what: the settings that decide its size.
        device: where the adapter will be.

    Raises:
        InputError: it needs more memory than is free.
    """
    free = free_bytes(device)
    if free is not None and num_numbers * BYTES_TRAINED > free:
        raise InputError(
            f"an adapter with {what} has {num_numbers:,} numbers, which take {num_numbers * BYTES_TRAINED / 1e9:,.1f} "
            f"GB and more in training, and {free / 1e9:,.1f} GB are free: give a smaller one"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a GPU, or of this machine; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        group = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError):  # "max" where a container has no limit
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            free = min(free, max(limit - used, 0))
        return free
    with suppress(OSError, ValueError):  # other systems say only how much there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def linear_sizes(model: Any) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of a model's linear layers but the head, on which adapters of layers are put."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = (module for module in model.modules() if module is not head and not isinstance(module, nn.Embedding))
    return [size for module in layers if (size := layer_size(module))]


def layer_size(module: Any) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a linear layer or an embedding; None for any other module."""
    if isinstance(module, nn.Linear):  # quantised ones are, too
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if type(module).__name__ == "Conv1D":  # GPT-2's, stored as [inputs, outputs]
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None
