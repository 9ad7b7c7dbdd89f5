"""What can be known of a base model whose weights are not on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from open_instruct.errors import InputError, input_faults
from open_instruct.model.loading import weight_files

BITS = {"4bit": 4, "8bit": 8}  # of a quantised weight


def has_weights(name: str, revision: str | None = None) -> bool:
    """Return whether weights of a model are on this machine: some in its folder, or all of them in the Hub's cache.

    Args:
        name: a folder, or a name on the Hub.
        revision: branch, tag or commit on the Hub; None: the main branch.

    Raises:
        InputError: the index in the cache is damaged.
    """
    if Path(name).is_dir():
        return bool(weight_files(name))

    def cached(file: str) -> str | None:
        path = try_to_load_from_cache(name, file, revision=revision)
        return path if isinstance(path, str) else None

    if cached(SAFE_WEIGHTS_NAME) or cached(WEIGHTS_NAME):
        return True
    for index_name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if index := cached(index_name):
            with input_faults(index, "fetch it again"):
                shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
            return all(cached(str(shard)) for shard in shards)
    return False


def check_countable(name: str, config: PretrainedConfig) -> None:
    """Refuse a model without weights whose memory its configuration does not say.

    Raises:
        InputError: its weights are stored quantised.
    """
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"model {name} holds no weights, and its config.json says that they are quantised: --dry_run counts such "
            "models only with their weights"
        )


def quantised_savings(base: Any, quantise: str | None) -> int:
    """Return how many bytes a base loses when bitsandbytes quantises it: its linear layers, without the head.

    Args:
        base: the model, not quantised, maybe on the meta device.
        quantise: "4bit", "8bit" or None.
    """
    if quantise is None:
        return 0
    kept = get_keys_to_not_convert(base)
    weights = [
        module.weight
        for name, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    ]
    return sum(weight.numel() * weight.element_size() - weight.numel() * BITS[quantise] // 8 for weight in weights)
