"""Each method trains its adapter and nothing else, and starts where its recipe says."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from open_instruct.flags import default_values
from open_instruct.methods import METHODS, model_facts
from open_instruct.methods.facts import DEFAULT_TEXT, between
from open_instruct.model.loading import load_model
from open_instruct.model.tokens import ordinary_tokens, text_tokens
from tests.conftest import METHODS as NAMES
from tests.conftest import TINY_MODEL

TEXT = "Reverse the list."


def settings(name: str, **values):
    """The settings of a method, with these values of its flags."""
    return METHODS[name].settings(default_values(**values))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture
def base():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete_and_says_its_source(name, base, tokenizer):
    facts = model_facts(base, tokenizer)
    recipe = METHODS[name].recipe(facts, default_values())
    assert 0 < recipe.learning_rate < 1 and 0 <= recipe.warmup_ratio < 1 and recipe.sources
    assert (METHODS[name].max_virtual_tokens > 0) == METHODS[name].is_soft_prompt


def test_the_rate_of_prompt_tuning_follows_the_embeddings(base, tokenizer):
    before = METHODS["prompt_tuning"].recipe(model_facts(base, tokenizer), default_values()).learning_rate
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(10)
    after = METHODS["prompt_tuning"].recipe(model_facts(base, tokenizer), default_values()).learning_rate
    assert after == pytest.approx(10 * before, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "full"])
def test_only_the_adapter_is_trainable_and_it_is_float32(name, base, tokenizer):
    values = default_values(num_virtual_tokens=4, prompt_tuning_init="sample_vocab", prefix_init="zero")
    model = METHODS[name].wrap(base.bfloat16(), tokenizer, METHODS[name].settings(values))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert all(any(word in n for word in ("lora_", "ia3_", "vera_", "prompt_encoder")) for n in trained)


def test_sample_vocab_starts_on_ordinary_tokens(base, tokenizer):
    chosen = settings("prompt_tuning", num_virtual_tokens=50, prompt_tuning_init="sample_vocab")
    prompt = METHODS["prompt_tuning"].wrap(base, tokenizer, chosen).prompt_encoder["default"].embedding.weight
    vocabulary = base.get_input_embeddings().weight
    known = set(ordinary_tokens(tokenizer))
    assert not known & set(tokenizer.all_special_ids)
    for row in prompt:
        nearest = (vocabulary - row).norm(dim=1).argmin().item()
        assert nearest in known and torch.equal(vocabulary[nearest], row)


def test_text_starts_on_the_texts_embeddings(base, tokenizer):
    chosen = settings("prompt_tuning", num_virtual_tokens=9, prompt_tuning_init="text", prompt_tuning_init_text=TEXT)
    model = METHODS["prompt_tuning"].wrap(base, tokenizer, chosen)
    ids = text_tokens(tokenizer, TEXT, 9)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, base.get_input_embeddings()(torch.tensor(ids)))
    assert model.peft_config["default"].prompt_tuning_init_text == TEXT


def test_random_is_pefts_own_and_off_the_manifold(base, tokenizer):
    chosen = settings("prompt_tuning", num_virtual_tokens=50, prompt_tuning_init="random")
    prompt = METHODS["prompt_tuning"].wrap(base, tokenizer, chosen).prompt_encoder["default"].embedding.weight
    assert prompt.std().item() == pytest.approx(1, abs=0.1)


def test_p_tuning_starts_with_the_embeddings_spread(base, tokenizer):
    model = METHODS["p_tuning"].wrap(base, tokenizer, settings("p_tuning", num_virtual_tokens=20))
    prompt = model.get_prompt(1)
    assert prompt.std().item() == pytest.approx(model_facts(base, tokenizer).embedding_std, rel=1e-2)


def test_a_prefix_from_text_computes_what_the_text_would(base, tokenizer):
    question = torch.tensor([tokenizer("horse apple", add_special_tokens=False)["input_ids"]])
    ids = torch.tensor([text_tokens(tokenizer, TEXT, 6)])
    with torch.no_grad():
        expected = base(torch.cat([ids, question], 1)).logits[:, 6:]
        chosen = settings("prefix_tuning", num_virtual_tokens=6, prefix_init="text", prompt_tuning_init_text=TEXT)
        model = METHODS["prefix_tuning"].wrap(base, tokenizer, chosen)
        torch.testing.assert_close(
            model(question, attention_mask=torch.ones_like(question)).logits, expected, rtol=1e-4, atol=1e-4
        )
        model.prompt_encoder["default"].embedding.weight.mul_(1.05)  # negative control
        assert (model(question, attention_mask=torch.ones_like(question)).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("projection", [False, True])
def test_a_zero_prefix_is_zero(base, tokenizer, projection):
    chosen = settings("prefix_tuning", num_virtual_tokens=5, prefix_init="zero", prefix_projection=projection)
    model = METHODS["prefix_tuning"].wrap(base, tokenizer, chosen)
    assert not model.prompt_encoder["default"](torch.arange(5)).any()


def test_rates_grow_for_narrow_models_only():
    assert between(5e-4, 2e-5, 4096) == between(5e-4, 2e-5, 2048) == pytest.approx(2e-5)
    assert between(5e-4, 2e-5, 128) == 5e-4 and between(8e-4, 2e-4, 512) == pytest.approx(4e-4)
    assert between(8e-4, 2e-4, 8) == between(8e-4, 2e-4, 64) > 8e-4


def test_a_recommended_prompt_leaves_room_for_the_input():
    recommended = METHODS["prompt_tuning"].recommended_virtual_tokens
    assert (
        recommended(None, None) == recommended(None, 4096) == recommended(8192, None) == recommended(8192, 2048) == 100
    )
    assert recommended(256, None) == 32 and recommended(4, None) == 1
    assert recommended(256, 156) == 100 and recommended(256, 200) == 56 and recommended(256, 256) == 1


@pytest.mark.parametrize("window", [4, 4096])
def test_a_prefix_starts_from_tokens_beyond_a_layers_window(window, tokenizer):
    """Mistral's cache keeps no more than its window; the start needs every token's keys and values."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mistral", vocab_size=len(tokenizer), sliding_window=window, **sizes)
    )
    chosen = settings("prefix_tuning", num_virtual_tokens=20, prefix_init="screened")
    assert model_facts(model, tokenizer, keys=True).key_std > 0
    wrapped = METHODS["prefix_tuning"].wrap(model, tokenizer, chosen)
    (first, second) = METHODS["prefix_tuning"].init_candidates(wrapped, tokenizer, chosen, 2)
    assert first.shape == second.shape == (20, 2 * 2 * 2 * 8) and (first != 0).all() and not torch.equal(first, second)


def test_keys_are_measured_as_they_are(base, tokenizer):
    ids = torch.tensor([tokenizer(DEFAULT_TEXT, add_special_tokens=False)["input_ids"]])
    layers = base(ids, use_cache=True).past_key_values.layers
    expected = sorted(layer.keys.std().item() for layer in layers)
    measured = model_facts(base, tokenizer, keys=True).key_std
    assert expected[0] <= measured <= expected[-1] and measured == pytest.approx((expected[1] + expected[2]) / 2)


@pytest.mark.parametrize("shape", [(4, 20), (1, 1)])
def test_qloras_gradient_is_that_of_lora_on_the_dequantised_base(shape, base, tokenizer):
    """Also after an evaluation: on some CPUs bitsandbytes then repacks the weights for a kernel without a gradient."""
    bnb = pytest.importorskip("bitsandbytes")
    config = AutoConfig.from_pretrained(TINY_MODEL)
    quantised = load_model(str(TINY_MODEL), config, torch.float32, "sdpa", quantise="4bit")
    layers = dict(quantised.named_modules())
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(layers[name], bnb.nn.Linear4bit):
                weight = layers[name].weight
                module.weight.copy_(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
    chosen = settings("lora", lora_rank=4, lora_dropout=0.0)
    models = [METHODS["lora"].wrap(model, tokenizer, chosen) for model in (quantised, base)]
    adapter = {name: torch.randn_like(p) * 0.1 for name, p in models[0].named_parameters() if p.requires_grad}
    gradients = []
    for model in models:
        model.load_state_dict(adapter, strict=False)
        with torch.no_grad():
            model.eval()(torch.arange(300, 320)[None])  # as the held-out loss does before training
        model.train()
        ids = torch.arange(300, 300 + shape[0] * shape[1]).view(shape)
        model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5
