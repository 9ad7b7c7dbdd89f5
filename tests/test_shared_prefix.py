"""Packed equals padded: the same loss of every token and the same gradient, for every method and architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from open_instruct.data import packing
from open_instruct.errors import InputError
from open_instruct.model import backends, shared_prefix
from open_instruct.model.backends import BACKENDS
from open_instruct.model.shared_prefix import Segments
from open_instruct.model.training_model import PackedModel, PaddedModel, longest_exact_row
from tests.tiny_models import (
    ARCHITECTURES,
    COMMON,
    VARIANTS,
    P,
    differences,
    examples,
    packed_model,
    packed_token_losses,
    padded_token_losses,
    random_model,
    wrap,
)

LLAMA_4 = {
    "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "num_key_value_heads": 2,
    "head_dim": 8, "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
}  # fmt: skip
PAIRS = [
    (architecture, variant)
    for architecture in ARCHITECTURES
    for variant in VARIANTS
    if (architecture, variant) != ("phi3", "ia3")
]


@pytest.mark.parametrize("architecture, variant", PAIRS)
def test_packed_equals_padded(architecture, variant):
    assert max(differences(architecture, variant)) < 1e-5


def test_ia3_on_phi3_is_refused():
    """Phi-3 has one matrix for queries, keys and values, which IA3 can't scale apart."""
    with pytest.raises(InputError, match="use --use_lora"):
        wrap("ia3", random_model("phi3"))


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
def test_a_window_shorter_than_the_prefix(variant, backend, monkeypatch):
    """Then no query but the first sees all virtual tokens, and none sees some of them."""
    monkeypatch.setitem(ARCHITECTURES, "mistral", {**ARCHITECTURES["mistral"], "sliding_window": P - 1})
    assert max(differences("mistral", variant, backend)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(variant):
    assert max(differences("llama", variant, checkpointing=True)) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "prefix_tuning"])
def test_gradient_checkpointing_recomputes_the_layers(variant, monkeypatch):
    """Or the test above shows nothing."""
    calls = []
    monkeypatch.setitem(BACKENDS, "counted", lambda inputs: calls.append(1) or backends.blocked(inputs))
    differences("llama", variant, "counted", checkpointing=True)
    assert len(calls) == 3 * 3  # three layers: forward, recomputation, and the evaluation of token losses


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mask_that_lets_an_example_see_another_is_noticed(variant, monkeypatch):
    def leaky(self, num_shared):
        one_segment = (0, self.num_prefix_tokens + sum(self.lengths))
        return Segments((one_segment,), 0, num_shared if self.keys_values else 0)

    monkeypatch.setattr(shared_prefix.PackedContext, "segments", leaky)
    assert max(differences("llama", variant)) > 1e-3


@pytest.mark.parametrize("variant", ["prompt_tuning", "p_tuning", "prefix_tuning", "projected prefix"])
def test_positions_that_are_off_by_one_are_noticed(variant, monkeypatch):
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda rows: (b := pack(rows)) | {"position_ids": b["position_ids"] + 1})
    assert max(differences("llama", variant)) > 1e-3


def test_positions_that_do_not_restart_are_noticed(monkeypatch):
    pack = packing.pack
    monkeypatch.setattr(
        packing, "pack", lambda rows: (b := pack(rows)) | {"position_ids": torch.arange(b["input_ids"].numel())[None]}
    )
    assert max(differences("llama", "prompt_tuning")) > 1e-3


def test_a_window_that_is_off_by_one_is_noticed(monkeypatch):
    def wide(inputs):
        return backends.blocked(replace(inputs, window=inputs.window + 1))

    monkeypatch.setitem(BACKENDS, "wide", wide)
    assert max(differences("mistral", "prefix_tuning", "wide")) > 1e-3


@pytest.mark.parametrize("variant", ["prompt_tuning", "prefix_tuning", "lora"])
def test_without_the_adapter_it_is_the_base_model(variant):
    model, method = wrap(variant, random_model("llama"))
    rows = examples()
    packed = packed_model(model, method)
    with packed.without_adapter():
        tokens = packed_token_losses(packed, rows)
    expected = padded_token_losses(random_model("llama"), rows)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert (packed_token_losses(packed, rows) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_process_without_examples_adds_nothing_but_takes_part(variant):
    model, method = wrap(variant, random_model("llama"))
    packed = packed_model(model, method)
    total, count = packed(**packing.Packing(64).collate([]))
    total.backward()
    assert total.item() == 0 and count.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_release_gives_the_models_own_attention_back():
    model, method = wrap("prefix_tuning", random_model("llama"))
    expected = padded_token_losses(model, examples())
    packed = packed_model(model, method)
    packed.release()
    assert torch.equal(padded_token_losses(model, examples()), expected)


def test_only_an_active_model_has_the_packed_attention():
    model, _ = wrap("full", random_model("llama"))
    config, batch = model.config, packing.pack(examples())
    own_attention = config._attn_implementation
    packed = PackedModel(model, lambda: None, backends.blocked)
    assert config._attn_implementation == own_attention
    with pytest.raises(RuntimeError, match="not active"):
        packed(**batch)
    with packed as entered:
        entered.activate()  # a second time changes nothing
        assert config._attn_implementation == shared_prefix.NAME
        assert packed(**batch)[0] > 0
    assert config._attn_implementation == own_attention
    packed.release()
    assert config._attn_implementation == own_attention
    with pytest.raises(RuntimeError, match="not active"):
        packed(**batch)


def test_an_error_gives_the_models_own_attention_back():
    model, _ = wrap("full", random_model("llama"))
    own_attention = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), PackedModel(model, lambda: None, backends.blocked):
        raise ZeroDivisionError
    assert model.config._attn_implementation == own_attention


def test_two_packed_models_of_one_model_are_not_active_together():
    """The second would take the packed attention for the model's own, and give that back."""
    model, _ = wrap("full", random_model("llama"))
    first, second = (PackedModel(model, lambda: None, backends.blocked, "linear") for _ in range(2))
    with first, pytest.raises(RuntimeError, match="release it first"):
        second.activate()
    with second:
        assert model.config._attn_implementation == shared_prefix.NAME


BOUNDS_OF_LLAMA_4 = [
    ({"attention_chunk_size": 64}, 64),
    ({"floor_scale": 32}, 31),
    ({"floor_scale": 32, "attn_temperature_tuning": False, "attention_chunk_size": 48}, 48),
]


@pytest.mark.parametrize("options, bound", BOUNDS_OF_LLAMA_4)
def test_rows_that_llama_4_would_cut_into_chunks_are_refused(options, bound):
    """Or its packed attention would see across chunks, and scale queries by their index in the row."""
    torch.manual_seed(0)
    model = Llama4ForCausalLM(Llama4TextConfig(**COMMON, **options, **LLAMA_4)).eval()
    assert longest_exact_row(model.config) == bound
    rows = [{"input_ids": list(range(3, 3 + 8)), "spans": [1, 8]}] * (bound // 8)
    expected = PaddedModel(model)(**packing.pad(rows, 0))[0].item()
    with PackedModel(model, lambda: None, backends.blocked) as packed:
        assert packed(**packing.pack(rows))[0].item() == pytest.approx(expected, rel=1e-5)
        with pytest.raises(InputError, match=f"exact up to {bound} positions, and this one has {bound // 8 * 8 + 8}"):
            packed(**packing.pack([*rows, rows[0]]))


def test_rows_of_other_models_have_no_such_bound():
    assert all(longest_exact_row(random_model(architecture).config) is None for architecture in ARCHITECTURES)
