"""Which precision and which attention are chosen on GPUs of all kinds, and what happens if a kernel does not run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from open_instruct.errors import InputError
from open_instruct.model import backends, loading
from open_instruct.model.attention_blocked import blocked
from open_instruct.model.shared_prefix import AttentionInputs
from open_instruct.training import forward
from open_instruct.training.forward_settings import ForwardSettings
from open_instruct.training.loop import loss_scale
from tests.test_backends import random_inputs
from tests.test_forward import choose, of_kind
from tests.tiny_models import random_model, wrap

T4, V100, A100, H100 = (7, 5), (7, 0), (8, 0), (9, 0)
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend a GPU of a compute capability, with or without the package flash-attn."""

    def pretend(capability: tuple[int, int], flash: bool = True) -> None:
        find_spec = importlib.util.find_spec
        spec = importlib.machinery.ModuleSpec("flash_attn", None) if flash else None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # older ones emulate it
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *more: spec if name == "flash_attn" else find_spec(name, *more)
        )

    return pretend


@pytest.mark.parametrize("capability, expected", [(T4, "float32"), (V100, "float32"), (A100, "bfloat16")])
def test_auto_takes_bfloat16_where_the_gpu_computes_it(capability, expected, gpu):
    gpu(capability)
    assert loading.choose_dtype("auto") == getattr(torch, expected)


@pytest.mark.parametrize("capability, dtype, head_size, flash, expected", [
    (H100, torch.bfloat16, 64, True, ["flash_attn", "varlen", "sdpa"]),
    (A100, torch.float16, 128, False, ["varlen", "sdpa"]),
    (A100, torch.bfloat16, 256, True, ["flash_attn", "varlen", "sdpa"]),
    (A100, torch.bfloat16, 512, True, ["sdpa"]),
    (A100, torch.bfloat16, 100, True, ["flash_attn", "sdpa"]),
    (A100, torch.float32, 64, True, ["sdpa"]),
    (T4, torch.float16, 64, True, ["sdpa"]),
    (V100, torch.bfloat16, 64, True, ["sdpa"]),
])  # fmt: skip
def test_the_back_ends_of_a_gpu(capability, dtype, head_size, flash, expected, gpu):
    gpu(capability, flash)
    assert backends.backend_names(None, CUDA, dtype, True, head_size) == expected
    if "varlen" not in expected:
        with pytest.raises(InputError, match=r"--attn_backend varlen can't be used: it .*use sdpa"):
            backends.backend_names("varlen", CUDA, dtype, True, head_size)


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("dtype, compute_dtype", [
    (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
])  # fmt: skip
def test_flash_attention_never_gets_float32(dtype, compute_dtype, asked, gpu):
    """A base in float32 computes in float32 wherever there is no autocast, as in plain generation."""
    gpu(A100)
    if asked and compute_dtype == torch.float32:
        with pytest.raises(InputError, match="add --dtype bfloat16"):
            loading.choose_attention(asked, dtype, compute_dtype)
        return
    expected = "flash_attention_2" if asked is not False and dtype != torch.float32 else None
    assert loading.choose_attention(asked, dtype, compute_dtype) == expected


@pytest.mark.parametrize("capability", [T4, V100])
def test_flash_attention_is_not_for_older_gpus(capability, gpu):
    gpu(capability)
    assert loading.choose_attention(None, torch.float16, torch.float16) is None
    with pytest.raises(InputError, match="Ampere or newer"):
        loading.choose_attention(True, torch.float16, torch.float16)


SHAPE = backends.HeadShape(4, 2, 8)


def refuses(error: Exception) -> Any:
    """A kernel that raises."""

    def kernel(inputs: AttentionInputs) -> torch.Tensor:
        raise error

    return kernel


def without_mask(inputs: AttentionInputs) -> torch.Tensor:
    """A kernel that ignores the boundaries of examples."""
    keys, values = (tensor.repeat_interleave(2, 1) for tensor in (inputs.key, inputs.value))
    return F.scaled_dot_product_attention(inputs.query, keys, values, is_causal=True).transpose(1, 2)


KERNELS = {
    "right": (blocked, ""),
    "GPU too old": (refuses(RuntimeError("FlashAttention only supports Ampere GPUs or newer.")), "Ampere"),
    "built for another torch": (refuses(ImportError("undefined symbol: _ZN3c10")), "undefined symbol"),
    "another signature": (refuses(TypeError("unexpected keyword argument 'softcap'")), "softcap"),
    "not there": (refuses(NotImplementedError("no kernel image")), "no kernel image"),
    "wrong": (lambda inputs: blocked(replace(inputs, scale=3 * inputs.scale)), "its results are wrong here"),
    "without shared keys": (without_mask, "it does not run here"),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_is_tried_before_it_is_used(kernel, monkeypatch):
    compute, reason = KERNELS[kernel]
    monkeypatch.setitem(backends.BACKENDS, "varlen", compute)
    said = backends.trial("varlen", torch.device("cpu"), torch.float32, SHAPE)
    assert (said == "") == (reason == "") and reason in said


def test_the_next_kernel_is_taken_with_a_line(monkeypatch, capsys):
    """A kernel may fail in the model alone, whose layers may have heads of several sizes."""
    monkeypatch.setattr(backends, "backend_names", lambda *arguments: ["flash_attn", "varlen", "sdpa"])
    monkeypatch.setitem(backends.BACKENDS, "flash_attn", refuses(RuntimeError("head dimension at most 256")))
    monkeypatch.setitem(backends.BACKENDS, "varlen", without_mask)
    model, method = wrap("lora", random_model("llama"))
    accelerator = Accelerator(cpu=True)
    settings = forward_settings(num_virtual_tokens=0)
    soft_prompt = partial(method.soft_prompt, model)
    chosen: Any = partial(forward.choose_packed, model, soft_prompt, settings, accelerator)
    assert chosen(torch.float32) == ("sdpa", "linear", "")
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and "flash_attn is left out: " in said and "head dimension at most 256" in said
    assert "varlen is left out: " in said


def test_a_requested_kernel_that_does_not_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "backend_names", lambda *arguments: ["varlen"])
    monkeypatch.setattr(backends, "trial", lambda *arguments: "it does not run here: no kernel image")
    model, method = wrap("lora", random_model("llama"))
    settings = forward_settings(attn_backend="varlen")
    accelerator = SimpleNamespace(device=CUDA)
    with pytest.raises(InputError, match="--attn_backend varlen can't be used: it does not run here: no kernel image"):
        forward.choose_packed(model, partial(method.soft_prompt, model), settings, accelerator, torch.bfloat16)


def test_out_of_memory_is_no_reason_to_choose_another_kernel(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "blocked", refuses(torch.OutOfMemoryError("CUDA out of memory")))
    model, method = wrap("lora", random_model("llama"))
    with pytest.raises(torch.OutOfMemoryError):
        forward.probe(model, partial(method.soft_prompt, model), "blocked", torch.float32)


STRUCTURES = {  # what models have been seen to raise, or might
    "AttributeError": AttributeError("'MoeCausalLMOutputWithPast' object has no attribute 'last_hidden_state'"),
    "TypeError": TypeError("Linear.forward() got an unexpected keyword argument 'input_ids'"),
    "IndexError": IndexError("tuple index out of range"),
    "RuntimeError": RuntimeError("The size of tensor a (4) must match the size of tensor b (8)"),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_a_model_of_unusual_structure_is_padded_with_a_line(kind, monkeypatch):
    monkeypatch.setattr(
        "open_instruct.model.training_model.find_head", lambda causal: (_ for _ in ()).throw(STRUCTURES[kind])
    )
    model, method = wrap("lora", random_model("llama"))
    description = choose(model, method, forward_settings()).description
    assert description.startswith("padded, 4 rows") and f"this llama model ({kind}: " in description


def forward_settings(**changes: Any) -> ForwardSettings:
    """The settings of tests/test_forward.py, with changes."""
    from tests.test_forward import changed

    return changed(**changes)


FAMILIES = {  # odd in one way each: structure, window in the mask alone, chunks, other names
    "llama4_text": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64},
    "modernbert-decoder": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_unusual_families_train_packed_or_padded(kind):
    model, method = wrap("prompt_tuning", of_kind(kind, **FAMILIES[kind]))
    chosen = choose(model, method, forward_settings())
    with chosen:
        rows = [{"input_ids": list(range(3, 3 + length)), "spans": [1, length]} for length in (20, 7)]
        loss, _ = chosen.model(**chosen.training.collate(rows))
        loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe"])
def test_routers_that_are_linear_layers_of_their_own_kind_are_left_alone(kind):
    """They return pairs, which PEFT's layers don't expect."""
    options = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model, method = wrap("lora", of_kind(kind, **options))
    choose(model, method, forward_settings())  # the adapter runs
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and not any("router" in name for name in trained)
    model, method = wrap("vera", of_kind(kind, **options))  # PEFT has no exceptions for VeRA
    with pytest.raises(InputError, match="does not run on a"):
        choose(model, method, forward_settings())


def test_a_method_that_can_not_be_put_on_a_model_is_said():
    from open_instruct.methods import METHODS
    from open_instruct.training.continuing import put_adapter_on
    from tests.tiny_models import VALUES

    method = METHODS["lora"]
    with pytest.raises(InputError, match=r"LoRA can't be put on a mamba model .*: choose another method"):
        put_adapter_on(of_kind("mamba"), None, method, method.settings(VALUES), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [True, False])
def test_a_model_that_an_adapter_does_not_run_on_is_said_padded_too(packing):
    """CodeGen with half of its rotary dimensions missing."""
    model, method = wrap("prompt_tuning", of_kind("codegen", n_head=4, n_embd=32, n_layer=2, rotary_dim=64))
    with pytest.raises(InputError, match="does not run on a codegen model"):
        choose(model, method, forward_settings(packing=packing))


def test_heads_of_different_sizes_are_no_shape():
    class Config(SimpleNamespace):
        @property
        def head_dim(self) -> int:
            raise RuntimeError("'head_dim' is a per-layer attribute")

    text = Config(num_attention_heads=4, hidden_size=32)
    assert backends.head_shape(SimpleNamespace(get_text_config=lambda: text)) is None


@pytest.mark.parametrize("max_length, packs", [(59, True), (60, False)])  # 5 virtual tokens come before
def test_a_window_in_the_mask_alone_bounds_what_is_packed(max_length, packs):
    """PhiMoE and Doge cut by their mask, which packed rows don't have."""
    options = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64}
    model, method = wrap("prompt_tuning", of_kind("phimoe", **options))
    description = choose(model, method, forward_settings(max_length=max_length)).description
    assert description.startswith("packed") == packs
    assert packs or "its window of 64 positions reaches the layers only through their mask" in description


def test_a_window_that_layers_are_told_does_not_bound_it():
    model, method = wrap("prompt_tuning", random_model("mistral"))  # window 9
    assert choose(model, method, forward_settings(max_length=200)).description.startswith("packed")


@pytest.mark.parametrize("dtype, num_shared, expanded", [
    (torch.float32, 0, True), (torch.float32, 3, True), (torch.bfloat16, 3, True), (torch.bfloat16, 0, False),
])  # fmt: skip
def test_grouped_heads_are_expanded_on_gpus_where_only_plain_products_take_them(
    dtype, num_shared, expanded, monkeypatch
):
    """The results are the same."""
    inputs = random_inputs([5, 3], num_shared, None, None)
    for name in ("query", "key", "value", "shared_key", "shared_value"):
        object.__setattr__(inputs, name, getattr(inputs, name).detach().to(dtype))
    expected = backends.sdpa(inputs)
    seen = []
    compute = F.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        seen.append((query.shape[1] == key.shape[1], options["enable_gqa"]))
        return compute(query, key, *more, **options)

    monkeypatch.setattr(backends, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert torch.allclose(backends.sdpa(inputs), expected, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert set(seen) == {(expanded, not expanded)}


@pytest.mark.parametrize("divisor, scale", [(1, 1), (64, 1), (130, 2), (6_000, 64), (200_000, 2048)])
def test_the_scale_of_a_float16_loss(divisor, scale):
    assert loss_scale(divisor) == scale


def test_small_gradients_survive_float16():
    """Of a mean over 200,000 tokens: as near to float32 as rounding allows. Unscaled, they are not."""
    from open_instruct.data import packing
    from open_instruct.model.training_model import PackedModel

    divisor, found = 2e6, {}
    rows = [{"input_ids": list(range(3, 3 + length)), "spans": [1, length]} for length in (20, 70, 40)]
    for name, dtype, scale in (
        ("expected", torch.float32, 1.0),
        ("scaled", torch.float16, loss_scale(divisor)),
        ("unscaled", torch.float16, 1.0),
    ):
        model, method = wrap("prefix_tuning", random_model("llama").to(dtype))
        packed = PackedModel(model, partial(method.soft_prompt, model), blocked)
        with packed:
            (packed(**packing.pack(rows))[0] * (scale / divisor)).backward()
        found[name] = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad]) / scale
    errors = {name: ((found[name] - found["expected"]).norm() / found["expected"].norm()).item() for name in found}
    assert errors["scaled"] < 0.02 and errors["unscaled"] > 3 * errors["scaled"], errors
