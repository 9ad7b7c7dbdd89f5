"""Training steps on fake CUDA tensors: which of them would fail on a GPU for their shapes, types or devices.

    python -m tests.fake_cuda LIBRARY CASE …         a CASE is METHOD,BACKEND,DTYPE,CHECKPOINTING[,MISTAKE]
    python -m tests.fake_cuda LIBRARY                all combinations

Prints a line of JSON for each case: {"case": …, "error": null or the error}. Numbers are not computed, so this shows
nothing about kernels' results. It runs in a process of its own, because LIBRARY (device.cpp, compiled) changes torch.
"""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from open_instruct.data import packing
from open_instruct.flags import default_values
from open_instruct.methods import METHODS, ModelFacts, p_tuning
from open_instruct.model import attention_blocked, attention_masks, attention_varlen
from open_instruct.model.backends import BACKENDS, missing
from open_instruct.model.precision import autocast
from open_instruct.model.training_model import PackedModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VOCAB = 128_256
SHAPE = LlamaConfig(  # of Llama 3.2 1B, two layers
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=131_072,
)  # fmt: skip
CUDA = torch.device("cuda")
LENGTHS = (37, 300, 120, 700)
VARIANTS = [*(method.name for method in METHODS.values() if not method.quantises_base), "projected_prefix"]
VALUES = default_values(num_virtual_tokens=20, prompt_tuning_init="random", prefix_init="random")


def main(words: list[str]) -> None:
    """Run the cases, or all."""
    pretend_cuda()
    for case in [word.split(",") for word in words] or all_cases():
        try:
            step(*case)
            error = None
        except Exception as failure:  # whatever it is, the test reports it
            error = f"{type(failure).__name__}: {str(failure)[:400]}"
        print(json.dumps({"case": ",".join(case), "error": error}), flush=True)


def all_cases() -> list[list[str]]:
    """Every combination that a run may choose."""
    cases = []
    for name, backend, dtype, checkpointing in itertools.product(VARIANTS, BACKENDS, DTYPES, ("False", "True")):
        method = METHODS["prefix_tuning" if name == "projected_prefix" else name]
        if method.trains_base and dtype == "float16":
            continue  # refused
        if missing(backend, CUDA, DTYPES[dtype], SHAPE.head_dim):
            continue
        cases.append([name, backend, dtype, checkpointing])
    return cases


def pretend_cuda() -> None:
    """Make torch believe in one GPU of compute capability 8.0, and flash-attn in its kernel's stand-in."""
    torch.cuda.get_device_capability = lambda *device: (8, 0)  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *args, **options: True
    for module in (torch.cuda.amp.common, torch.cuda.amp.autocast_mode):
        module.amp_definitely_not_available = lambda: False
    torch.nn.Module._apply = replace_parameters  # type: ignore[assignment, method-assign]
    p_tuning.model_facts = lambda *args: ModelFacts(SHAPE.hidden_size, 0.02, 1.0)  # fake weights can't be measured
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attention  # type: ignore[attr-defined]
    package.__spec__ = SimpleNamespace(loader=None)  # type: ignore[assignment]
    sys.modules["flash_attn"] = package


def replace_parameters(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.nn.Module:
    """Stand in for Module._apply, which changes parameters in place: fake tensors can't change their device."""
    for child in module.children():
        replace_parameters(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                changed = function(parameter)
            if changed is not parameter:
                module._parameters[name] = torch.nn.Parameter(changed, parameter.requires_grad)
    module._buffers.update({name: function(buffer) for name, buffer in module._buffers.items() if buffer is not None})
    return module


class FlashStandIn(torch.autograd.Function):
    """What flash-attn's variable-length kernel demands, by its documentation; shapes without numbers."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the queries' shape."""
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return gradients of the right shapes, after the same demands."""
        q, k, v = ctx.saved_tensors
        demand(gradient.dtype == q.dtype, f"its gradient is {gradient.dtype}")
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> torch.Tensor:
    """Stand in for `flash_attn.flash_attn_varlen_func`."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        demand(tensor.dtype in (torch.float16, torch.bfloat16), f"{name} is {tensor.dtype}, not 16 bits")
        demand(tensor.dtype == q.dtype, "types differ")
        demand(tensor.is_cuda, f"{name} is on {tensor.device}")
        demand(tensor.dim() == 3 and tensor.stride(-1) == 1, f"{name} has strides {tensor.stride()}")
        demand(tensor.shape[-1] <= 256, f"heads of size {tensor.shape[-1]}")
    demand(q.shape[1] % k.shape[1] == 0 and k.shape == v.shape, "numbers of heads")
    for lengths in (cu_seqlens_q, cu_seqlens_k):
        demand(lengths.dtype == torch.int32 and lengths.is_cuda and lengths.is_contiguous(), "cumulative lengths")
    demand(len(cu_seqlens_q) == len(cu_seqlens_k), "numbers of sequences")
    demand(0 < max_seqlen_q <= len(q) and 0 < max_seqlen_k <= len(k), "longest sequences")
    demand(causal and len(window_size) == 2, "mask")
    output = FlashStandIn.apply(q, k, v)
    assert isinstance(output, torch.Tensor)
    return output


def demand(is_met: bool, what: str) -> None:
    """Fail as the kernel would."""
    if not is_met:
        raise RuntimeError(f"flash-attn refuses this call: {what}")


def step(name: str, backend: str, dtype_name: str, checkpointing: str, mistake: str = "") -> None:
    """Run a forward and a backward pass; every trained parameter must get a float32 gradient on the GPU."""
    for cache in (attention_varlen.varlen_index, attention_blocked._groups):
        cache.cache_clear()
    attention_masks.CACHES.clear()
    method = METHODS["prefix_tuning" if name == "projected_prefix" else name]
    dtype = DTYPES[dtype_name]
    tokenizer = SimpleNamespace(all_special_ids=[0], added_tokens_decoder={}, get_vocab=lambda: {"a": 1, "b": 2})
    with FakeTensorMode(allow_non_fake_inputs=False):
        torch.set_default_dtype(torch.float32 if method.trains_base else dtype)
        try:
            with CUDA:
                base = LlamaForCausalLM(SHAPE)
        finally:
            torch.set_default_dtype(torch.float32)
        base.config.use_cache = False
        settings = method.settings(VALUES | {"prefix_projection": name == "projected_prefix"})
        model = method.wrap(base, tokenizer, settings).to(CUDA)
        training_model = make(model, method, backend, mistake)
        if checkpointing == "True":
            base.gradient_checkpointing_enable({"use_reentrant": False})
        training_model.train()
        rows = [{"input_ids": list(range(length)), "spans": [1, length]} for length in LENGTHS]
        batch = {key: on_gpu(value) for key, value in packing.pack(rows).items()}
        with training_model:
            with autocast("cuda", torch.float32 if mistake == "no autocast" else dtype):
                loss, _ = training_model(**batch)
            (loss / 100).backward()
        demand(loss.is_cuda and loss.dtype == torch.float32, f"loss {loss.dtype} on {loss.device}")
        trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
        demand(bool(trained), "nothing is trained")
        for key, parameter in trained.items():
            gradient = parameter.grad
            demand(gradient is not None, f"no gradient of {key}")
            demand(gradient.is_cuda and gradient.dtype == torch.float32, f"gradient of {key}: {gradient.dtype}")


def on_gpu(value: Any) -> Any:
    """Return a fake tensor of the same shape on the GPU; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype, device=CUDA) if isinstance(value, torch.Tensor) else value


def make(model: Any, method: Any, backend: str, mistake: str) -> PackedModel:
    """Return the module to train, with one of the mistakes that the tests must notice."""
    compute = BACKENDS[backend]

    def mistaken(inputs: Any) -> torch.Tensor:
        if mistake == "mask on the CPU":
            num_tokens = inputs.query.shape[2]
            mask = attention_masks.visible_keys(num_tokens, num_tokens, None, torch.device("cpu"))
            return torch.nn.functional.scaled_dot_product_attention(
                inputs.query, inputs.key, inputs.value, attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)
        if mistake == "float32":
            inputs = SimpleNamespace(
                **{**vars(inputs), **{key: getattr(inputs, key).float() for key in ("query", "key", "value")}}
            )
        return compute(inputs)

    soft_prompt = lambda: method.soft_prompt(model)  # noqa: E731
    return PackedModel(model, soft_prompt, mistaken if mistake else compute, "linear")
