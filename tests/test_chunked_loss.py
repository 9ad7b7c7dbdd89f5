"""The loss in pieces equals the loss at once, and a model's head is recognised or left to the model."""

from __future__ import annotations

import pytest
import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM

from open_instruct.data import packing
from open_instruct.model.backends import blocked
from open_instruct.model.chunked_loss import chunked_cross_entropy, find_head, head_forms
from open_instruct.model.training_model import PackedModel, PaddedModel
from tests.tiny_models import COMMON, examples, packed_model, random_model, wrap


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_the_head_is_found_and_pieces_give_the_whole_loss(architecture, monkeypatch):
    base = random_model(architecture)
    head = head_forms(base)[find_head(base)]
    hidden, targets = torch.randn(20, 32, requires_grad=True), torch.randint(0, 120, (20,))
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    weight = base.get_output_embeddings().weight
    wanted = torch.autograd.grad(2 * expected, (hidden, weight))
    monkeypatch.setattr("open_instruct.model.chunked_loss.CHUNK_ELEMENTS", {"cpu": 7 * 120})
    monkeypatch.setattr("open_instruct.model.chunked_loss.MIN_ROWS_OF_A_TRAINED_HEAD", 3)
    loss = chunked_cross_entropy(hidden, targets, head, 120, [weight])
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(2 * loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_soft_cap_that_small_logits_hardly_feel_is_not_left_out():
    base = random_model("gemma2")
    base.config.final_logit_softcapping = 30.0
    ids = torch.arange(4)[None]
    with torch.no_grad():
        hidden = base.eval().get_decoder()(input_ids=ids).last_hidden_state
        linear = base.get_output_embeddings()(hidden)
        base.get_output_embeddings().weight.mul_(
            4 / linear.abs().max()
        )  # a cap of 30 changes logits of 4 by half a percent
        hidden = base.get_decoder()(input_ids=ids).last_hidden_state
        expected = base(input_ids=ids).logits
        assert 0 < (base.get_output_embeddings()(hidden) - expected).abs().max() < 1e-2 * expected.abs().max()
        head = head_forms(base)[find_head(base)]
        torch.testing.assert_close(head(hidden), expected)


def test_a_head_of_unknown_form_is_left_to_the_model(monkeypatch):
    """Its logits are computed by the model itself, at the labelled positions."""
    model, method = wrap("prompt_tuning", random_model("llama"))
    with packed_model(model, method) as packed:
        expected = packed(**packing.pack(examples()))[0].item()
    monkeypatch.setattr("open_instruct.model.training_model.find_head", lambda causal: None)
    with packed_model(model, method) as packed:
        assert packed.head is None
        assert packed(**packing.pack(examples()))[0].item() == pytest.approx(expected, rel=1e-6)


def test_a_head_that_no_known_form_describes_is_not_guessed(monkeypatch):
    base = random_model("llama")
    own = type(base).forward

    def squared(self, *inputs, **options):
        output = own(self, *inputs, **options)
        output.logits = output.logits**2
        return output

    assert find_head(base) is not None
    monkeypatch.setattr(type(base), "forward", squared)
    assert find_head(base) is None


def without_a_named_decoder(kind: str) -> torch.nn.Module:
    """Return a tiny model whose `get_decoder` gives something else than its decoder."""
    torch.manual_seed(0)
    if kind == "llama4_text":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
        return Llama4ForCausalLM(Llama4TextConfig(**COMMON, **experts, num_key_value_heads=2, head_dim=8))
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**COMMON, cls_token_id=1, sep_token_id=2))


@pytest.mark.parametrize("kind", ["llama4_text", "modernbert-decoder"])
def test_a_model_that_does_not_name_its_decoder_makes_its_own_logits(kind):
    model = without_a_named_decoder(kind).train()
    assert find_head(model) is None
    assert model.training
    with PackedModel(model, lambda: None, blocked) as packed:
        assert packed.head_name is None
        loss = packed(**packing.pack(examples()))[0]
    model.eval()
    expected = PaddedModel(model)(**packing.pad(examples(), 0))[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
