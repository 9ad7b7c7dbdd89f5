"""Prefixes of keys and values in vLLM: a connector that puts them into its cache, and a guard of their placeholders.

vLLM asks a connector which tokens of a request are "computed elsewhere". For a prompt that begins with a prefix's P
placeholders these are the placeholders, except those that vLLM's own prefix cache holds. Before the next forward pass,
the connector writes their keys and values into the slots that vLLM has given them. So a prefix is written once, and
then found in vLLM's cache like any other beginning that requests share; where P is no multiple of the block size, the
last block's part is written for each request. A preempted request is asked about anew.

Interface: `vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1`, which vLLM calls experimental, and
`AttentionImpl.do_kv_cache_update`, by which vLLM's attention writes its own cache, so that no layout is assumed here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm

from open_instruct.serving.checkpoint import Prefix, added_ids, read_prefixes
from open_instruct.serving.slots import can_be_computed, heads_of, slots_of, wanted_prefix
from open_instruct.serving.vllm_command import PROCESSOR

TRIED = "0.32.0"
try:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
    )
    from vllm.logger import init_logger
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ImportError as error:
    raise ImportError(
        f"vLLM {vllm.__version__} lacks what prefixes need ({error}): they were tried with {TRIED}"
    ) from None

REFUSAL = (
    "the tokens of a prefix can't be computed: they stand at the beginning of a prompt alone, something follows them, "
    "and the prompt's log-probabilities are not asked for (prompt_logprobs, echo)"
)
EXPECTED = {  # parameters of the interface as it was when this was tried
    "__init__": ("self", "vllm_config", "role", "kv_cache_config"),
    "get_num_new_matched_tokens": ("self", "request", "num_computed_tokens"),
    "update_state_after_alloc": ("self", "request", "blocks", "num_external_tokens"),
    "build_connector_meta": ("self", "scheduler_output"),
    "register_kv_caches": ("self", "kv_caches"),
    "get_transfer_results": ("self", "finished_req_ids"),
}


def check_interface() -> None:
    """Refuse a vLLM whose interface is another one.

    Raises:
        ImportError: naming what differs, and the version that works.
    """
    for name, expected in EXPECTED.items():
        method = getattr(KVConnectorBase_V1, name, None)
        found = tuple(inspect.signature(method).parameters) if method else None
        if found != expected:
            raise ImportError(
                f"vLLM {vllm.__version__} has another interface for connectors ({name} takes {found}, not {expected}): "
                f"prefixes were tried with vLLM {TRIED}"
            )


check_interface()
logger = init_logger(__name__)


@dataclass
class Load:
    """Keys and values to be written for one request: the positions of a prefix from `start` on, into `slots`."""

    adapter: str
    start: int
    slots: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers for one step."""

    loads: list[Load] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)  # requests that end with an error


class PrefixConnector(KVConnectorBase_V1):
    """Serves the prefixes of the checkpoint that vLLM serves."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Read what the checkpoint holds.

        Raises:
            ValueError: it is no merged checkpoint, or the model's layers don't share one table of blocks.
        """
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.prefixes = read_prefixes(Path(vllm_config.model_config.model))
        self.placeholders = frozenset(token for prefix in self.prefixes for token in prefix.ids)
        self.block_size = vllm_config.cache_config.block_size
        self.layers = vllm_config.compilation_config.static_forward_context
        if PROCESSOR not in (vllm_config.model_config.logits_processors or ()):
            raise ValueError(f"prefixes need --logits-processors {PROCESSOR}: start the server by scripts/serve.sh")
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ValueError("prefixes need a model whose layers share one table of blocks: this one has several")
        self.wanted: dict[str, tuple[Prefix, list[int], int]] = {}  # by request: its blocks, and positions to write
        self.failed: set[str] = set()
        self.keys_values: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}  # by adapter and layer
        self.device = torch.device("cpu")  # of this process's cache

    # In the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many placeholders are not in vLLM's own cache, and whether they take longer than to the next step.

        A request for which vLLM would compute placeholders waits for a load that fails, which ends it with an error.
        """
        prefix = wanted_prefix(request.prompt_token_ids, self.prefixes)
        if not can_be_computed(request.prompt_token_ids, prefix, self.placeholders):
            return 1, True
        return max(0, prefix.num_tokens - num_computed_tokens) if prefix else 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note that a request with a prefix is about to be scheduled; `build_connector_meta` sees where it begins."""
        prefix = wanted_prefix(request.prompt_token_ids, self.prefixes)
        if not can_be_computed(request.prompt_token_ids, prefix, self.placeholders):
            logger.error("request %s: %s", request.request_id, REFUSAL)
            self.failed.add(request.request_id)
        elif prefix:
            (block_ids,) = blocks.get_block_ids()
            self.wanted[request.request_id] = (prefix, list(block_ids), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """Return what is to be written before this step.

        Raises:
            RuntimeError: vLLM is about to compute placeholders, which would be wrong, and wrong for later requests too.
        """
        meta = Loads(failed=set(self.failed))
        self.failed.clear()
        starts = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, (prefix, block_ids, num_external_tokens) in self.wanted.items():
            if starts[request_id] < prefix.num_tokens:
                raise RuntimeError(f"request {request_id} begins within its prefix, at {starts[request_id]}")
            if num_external_tokens:
                start = prefix.num_tokens - num_external_tokens
                slots = slots_of(block_ids, self.block_size, start, prefix.num_tokens)
                meta.loads.append(Load(prefix.adapter, start, slots))
        self.wanted.clear()
        return meta

    # In the workers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Read the prefixes, and keep each layer's own heads in the precision of its cache.

        Raises:
            ValueError: a prefix belongs to another model, or its file is damaged.
        """
        rank, num_ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.device = next(iter(kv_caches.values())).device
        for prefix in self.prefixes:
            if len(kv_caches) != prefix.num_layers:
                raise ValueError(
                    f"prefix {prefix.adapter} has {prefix.num_layers} layers, and this process has {len(kv_caches)}: "
                    "merge it with its own base, and use no pipeline parallelism"
                )
            pairs, parts = prefix.load(), {}
            for name, cache in kv_caches.items():
                layer, index = self.layers[name], extract_layer_index(name)
                if layer.head_size != prefix.head_size:
                    raise ValueError(
                        f"prefix {prefix.adapter} has heads of {prefix.head_size}, and {name} of this model has heads "
                        f"of {layer.head_size}: merge it with its own base"
                    )
                if not hasattr(layer.impl, "do_kv_cache_update"):
                    kind = type(layer.impl).__name__
                    raise ValueError(f"{kind} of vLLM can't be given keys and values: use another attention back end")
                heads = heads_of(prefix.num_heads, layer.num_kv_heads, rank, num_ranks)
                dtype = cache.dtype if cache.is_floating_point() and cache.dtype.itemsize > 1 else torch.bfloat16
                keys, values = (part[:, heads].to(self.device, dtype) for part in pairs[index])
                parts[name] = (keys, values)
            self.keys_values[prefix.adapter] = parts

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write keys and values [P', K, E] of the positions that this step's requests lack."""
        meta = self._get_connector_metadata()
        assert isinstance(meta, Loads)
        self.failed |= meta.failed
        for load in meta.loads:
            slots = torch.tensor(load.slots, dtype=torch.int64, device=self.device)
            for name, parts in self.keys_values[load.adapter].items():
                keys, values = (part[load.start :] for part in parts)
                layer = self.layers[name]
                layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the requests that end with an error."""
        failed, self.failed = self.failed, set()
        return KVConnectorTransferResults(finished_recving=failed, failed_recving=set(failed))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See the base class: everything was written when the step began."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """See the base class: nothing is kept elsewhere."""

    def wait_for_save(self) -> None:
        """See the base class."""


class Placeholders(LogitsProcessor):
    """Gives all rows that a merge added no probability: vLLM does not read `suppress_tokens` of generation_config."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse what would compute the whole prompt; vLLM answers with HTTP status 400.

        Raises:
            ValueError: naming it.
        """
        if sampling_params.prompt_logprobs is not None or sampling_params.skip_reading_prefix_cache:
            raise ValueError(REFUSAL)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Read which tokens they are."""
        self.ids = torch.tensor(added_ids(Path(vllm_config.model_config.model)), dtype=torch.int64, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] with minus infinity for these tokens."""
        return logits.index_fill_(1, self.ids, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        """Return that the most probable token can become another one."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """See the base class: all requests are treated alike."""
