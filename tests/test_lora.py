"""LoRA's places, forms and starts: each is what its paper says, leaves the base alone, and is saved as plain PEFT."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import open_instruct
from open_instruct import InputError
from open_instruct.command_line import parse
from open_instruct.data import packing
from open_instruct.finetune_peft import main as finetune
from open_instruct.flags import check_flags, default_values
from open_instruct.merge_peft import main as merge_main
from open_instruct.methods import METHODS, Feature
from open_instruct.methods.lora_targets import decoder, linear_layers, part_of_layer, target_modules
from open_instruct.model.memory import counts
from open_instruct.model.training_model import PaddedModel, base_only
from open_instruct.training.optimizer import OptimizerSettings, make_optimizer, set_step
from tests.conftest import TINY_MODEL, tiny_llama, without_measurements, write_conversations
from tests.test_finetune import plain_loss
from tests.tiny_models import (
    ARCHITECTURES,
    COMMON,
    examples,
    gradient_error,
    packed_model,
    packed_token_losses,
    padded_token_losses,
    random_model,
    step,
)

LORA = METHODS["lora"]
SMALL = {"lora_rank": 4, "lora_dropout": 0.0}
OTHERS = {  # architectures that call their parts otherwise, or have Conv1D, or no module around the feed-forward
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "phi": {},
    "gpt_bigcode": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
}


def settings(**values):
    return LORA.settings(default_values(**{**SMALL, **values}))


def model_of(architecture):
    options = {**COMMON, **({"hidden_act": "gelu"} if architecture == "phi" else {}), **OTHERS[architecture]}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **options))


def wrap(base, noise=0.05, **values):
    """The base with LoRA that is not at its start."""
    torch.manual_seed(1)
    model = LORA.wrap(base, None, settings(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return model


def updated(model):
    """Full names of the layers that have LoRA."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


# Places


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
def test_attention_and_mlp_are_found_in_every_architecture(architecture):
    """Together they are all linear layers of the decoder, and what the words promise."""
    model = random_model(architecture) if architecture in ARCHITECTURES else model_of(architecture)
    layers, count = decoder(model)
    inside = {name for name in linear_layers(model) if name.startswith(f"{layers}.")}
    attention, mlp = (set(target_modules(model, [word], None)) for word in ("attention", "mlp"))
    assert attention | mlp == inside and not attention & mlp and count == 3
    assert len(attention) % 3 == len(mlp) % 3 == 0 and attention and mlp
    assert all(("attn" in name or "attention" in name) == (name in attention) for name in inside)
    assert part_of_layer(model, "lm_head") is None
    half = set(target_modules(model, ["attention"], ["0-1"]))
    assert half == {name for name in attention if not name.startswith(f"{layers}.2.")}
    assert updated(LORA.wrap(model, None, settings(lora_target_modules=["attention"], lora_layers=["1"]))) == {
        name for name in attention if name.startswith(f"{layers}.1.")
    }


def test_names_and_expressions_choose_as_peft_does():
    for words in (["q_proj"], ["self_attn.v_proj", "up_proj"], [r".*layers\.[02]\..*(q|v)_proj"], ["lm_head"]):
        ours = updated(LORA.wrap(random_model("llama"), None, settings(lora_target_modules=words)))
        config = LoraConfig(target_modules=words[0] if "*" in words[0] else words)
        assert ours == updated(get_peft_model(random_model("llama"), config)) and ours
    mixed = updated(LORA.wrap(random_model("llama"), None, settings(lora_target_modules=["mlp", "q_proj"])))
    assert len(mixed) == 3 * 4


@pytest.mark.parametrize(
    "values, says",
    [
        (
            {"lora_target_modules": ["query"]},
            "nothing in this llama model matches; its layers are embed_tokens,",
        ),
        ({"lora_target_modules": ["q_proj", "nope"]}, "--lora_target_modules nope: nothing"),
        ({"lora_target_modules": ["self_attn"]}, "(LlamaAttention) is no linear layer and no embedding"),
        ({"lora_target_modules": [".*nothing"]}, "nothing in this llama model matches"),
        ({"lora_target_modules": [r"(.*[a-z_.]*)*!"]}, "it was still computing"),
        ({"lora_layers": ["1-3"]}, "the model's layers are 0 to 2"),
        ({"lora_layers": ["1"], "lora_target_modules": ["lm_head"]}, "layer 1 has none of the modules"),
        ({"modules_to_save": ["head"]}, "nothing in this llama model has that name; there are embed_tokens, q_proj"),
        ({"modules_to_save": ["layers"]}, "is a list of modules"),
        ({"modules_to_save": ["model"]}, "holds all layers"),
        ({"modules_to_save": ["rotary_emb"]}, "has no parameters"),
        ({"modules_to_save": ["mlp", "up_proj"]}, "lies inside model.layers.0.mlp"),
        ({"lora_bias": "all"}, "have no biases"),
        ({"init_lora_weights": "pissa", "lora_target_modules": ["embed_tokens"]}, "is an embedding"),
    ],
)
def test_what_the_model_does_not_have_is_refused(values, says):
    with pytest.raises(InputError) as caught:
        LORA.wrap(random_model("llama"), None, settings(**values))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--lora_target_modules", "a", "b.*"], "'b.*' is a regular expression, and stands alone"),
        (["--lora_target_modules", "all-linear", "mlp"], "all-linear means every layer, and stands alone"),
        (["--lora_target_modules", "(.*"], "no regular expression"),
        (["--lora_target_modules", ".*", "--lora_layers", "1"], "says itself which layers"),
        (["--lora_layers", "3-1"], "ends before it begins"),
        (["--lora_layers", "first"], "neither an index of a layer"),
        (["--lora_layers", "1", "²"], "neither an index of a layer"),
        (["--init_lora_weights", "false"], "no such start: use true, gaussian"),
        (["--init_lora_weights", "pissa_niter_0"], "no such start"),
        (["--init_lora_weights", "loftq"], "LoftQ replaces the weights"),
        (["--init_lora_weights", "eva"], "EVA needs the inputs"),
        (["--init_lora_weights", "corda"], "CorDA needs the covariances"),
        (["--init_lora_weights", "pissa", "--weight_decay", "0.1"], "would shrink"),
        (["--init_lora_weights", "olora", "--load_in_8bit"], "not exact where they are quantised"),
        (["--init_lora_weights", "olora", "--use_8bit_optimizer"], "might move"),
        (["--lora_bias", "all", "--load_in_4bit"], "quantised layers round their biases"),
        (["--loraplus_ratio", "0"], "must be above 0"),
    ],
)
def test_flags_that_mean_nothing_are_refused(words, says):
    with pytest.raises(InputError) as caught:
        check_flags(*parse(["--model_name_or_path", "m", "--train_file", "f", "--use_lora", *words]))
    assert says in str(caught.value)


def test_sharded_engines_refuse_what_they_would_lose():
    for values in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ["lm_head"]}):
        obstacles = LORA.obstacles_of(settings(**values))
        assert set(obstacles) - {Feature.EIGHT_BITS} == {Feature.ZERO_3, Feature.FSDP}
    assert Feature.EIGHT_BITS in LORA.obstacles_of(settings(use_dora=True))
    assert not LORA.obstacles_of(settings(use_rslora=True, loraplus_ratio=4.0))


# Forward pass and gradient

FORMS = {
    "dora": {"use_dora": True},
    "rslora, attention of two layers": {
        "use_rslora": True, "lora_target_modules": ["attention"], "lora_layers": ["0", "2"],
    },
    "pissa": {"init_lora_weights": "pissa"},
    "head and embedding": {"lora_target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "head and norm in full": {"modules_to_save": ["lm_head", "model.norm"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("architecture, form", [
    *(("llama", form) for form in FORMS), ("gemma2", "dora"), ("gemma2", "head and embedding"),
    ("gemma2", "embedding in full"), ("gpt_neox", "biases"),
])  # fmt: skip
def test_packed_is_padded(architecture, form):
    """Token losses and gradient of a packed row are those of PEFT's own forward; other weights are told apart."""
    values = FORMS.get(form, {"lora_bias": "all"})
    model, rows = wrap(random_model(architecture), **values), examples()
    expected_loss, expected = step(PaddedModel(model), packing.pad(rows, 0))
    tokens = padded_token_losses(model, rows)
    packed = packed_model(model, LORA)
    loss, gradient = step(packed, packing.pack(rows))
    found = packed_token_losses(packed, rows)
    packed.release()
    assert loss == pytest.approx(expected_loss, rel=1e-5) and gradient_error(gradient, expected) < 1e-4
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)
    other = padded_token_losses(wrap(random_model(architecture), noise=0.06, **values), rows)
    assert (other - tokens).abs().max() > 1e-3


@pytest.mark.parametrize("values", [*FORMS.values(), {"lora_bias": "all"}, {"lora_bias": "lora_only"}])
def test_without_its_adapter_a_model_is_its_base(values):
    """Whatever has been trained; and with it, it is another one. Biases come back afterwards."""
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        expected = random_model("gpt_neox" if "lora_bias" in values else "llama").eval()(ids).logits
        model = wrap(random_model("gpt_neox" if "lora_bias" in values else "llama"), **values).eval()
        trained = model(ids).logits
        with base_only(model):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids).logits, trained) and (trained - expected).abs().max() > 1e-2


@pytest.mark.parametrize("values", [*FORMS.values(), {"use_dora": True, "modules_to_save": ["lm_head"]}])
def test_the_numbers_of_an_adapter_are_known_before_it_is_made(values):
    model = random_model("llama")
    known = LORA.num_numbers(model, settings(**values))
    made = LORA.wrap(model, None, settings(**values))
    assert known == sum(p.numel() for p in made.parameters() if p.requires_grad)
    share = 2 if "init_lora_weights" in values else 1
    assert counts(made)["trainable_parameters"] * share == known


# Starts


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_16"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_start_from_the_weights_trains_as_pefts_own(init, architecture, rslora):
    """Five steps of AdamW: the same function as PEFT's, whose base is changed; here base and fixed half stay."""
    make = random_model if architecture == "llama" else model_of
    base, other = make(architecture), make(architecture)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    target = "c_attn" if architecture == "gpt2" else "q_proj"
    torch.manual_seed(0)
    ours = LORA.wrap(base, None, settings(init_lora_weights=init, lora_target_modules=[target], use_rslora=rslora))
    options = {"r": 4, "lora_alpha": 16, "target_modules": [target], "use_rslora": rslora}
    torch.manual_seed(0)
    theirs = get_peft_model(other, LoraConfig(init_lora_weights=init, fan_in_fan_out=architecture == "gpt2", **options))
    plain = get_peft_model(make(architecture), LoraConfig(**options))
    ids = torch.arange(3, 40)[None]
    outputs = []
    # PEFT's OLoRA does not run on transposed weights, and the draws of the approximate start are others.
    is_comparable = init != "pissa_niter_16" and (init, architecture) != ("olora", "gpt2")
    for model in (ours, theirs if is_comparable else ours, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        first = model.eval()(ids).logits
        for _ in range(5):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append((first.detach(), model(ids).logits.detach()))
    exact = {"rtol": 1e-3, "atol": 2e-3}
    torch.testing.assert_close(outputs[0][0], make(architecture).eval()(ids).logits.detach(), rtol=1e-5, atol=1e-5)
    if is_comparable:
        torch.testing.assert_close(outputs[0][1], outputs[1][1], **exact)
    moved = (outputs[0][1] - outputs[0][0]).abs().max()
    assert moved > 0.05 and (outputs[2][1] - outputs[0][1]).abs().max() > 0.05  # LoRA's own start is another training
    layer = next(module for module in ours.modules() if isinstance(module, LoraLayer))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not torch.equal(A[:4], A[4:]) and not torch.equal(B[:, :4], -B[:, 4:])
    anew = make(architecture)
    torch.manual_seed(0)
    again = LORA.wrap(anew, None, settings(init_lora_weights=init, lora_target_modules=[target]))
    fixed = next(module for module in again.modules() if isinstance(module, LoraLayer))
    if not rslora:  # which has another scale, and so another start
        assert torch.equal(A[4:], fixed.lora_A["default"].weight[4:])
    for name, value in ours.unload().state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_rank_beyond_a_weights_is_filled_with_zeros_and_the_base_is_16_bit():
    model = LORA.wrap(random_model("llama").bfloat16(), None, settings(init_lora_weights="pissa", lora_rank=24))
    ids = torch.arange(3, 30)[None]
    expected = random_model("llama").bfloat16().eval()(ids).logits
    torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=2e-2, atol=2e-2)
    layer = dict(model.named_modules())["base_model.model.model.layers.0.self_attn.k_proj"]  # 16 × 32
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.dtype == torch.float32 and A.shape == (48, 32) and not A[16:24].any() and not B[:, 40:].any()
    torch.testing.assert_close(
        layer.scaling["default"] * B[:, :24] @ A[:24], layer.base_layer.weight.float(), rtol=1e-3, atol=1e-3
    )


def test_trained_copies_and_biases_of_a_16_bit_base_are_float32():
    for architecture, values in (("llama", {"modules_to_save": ["lm_head"]}), ("gpt_neox", {"lora_bias": "all"})):
        model = LORA.wrap(random_model(architecture).bfloat16(), None, settings(**values))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert torch.bfloat16 in {p.dtype for p in model.parameters()}


# LoRA+


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_loraplus_gives_b_a_multiple_of_the_rate_at_every_step(schedule, final):
    model = wrap(random_model("llama"), loraplus_ratio=8.0, modules_to_save=["lm_head"])
    groups = LORA.parameter_groups(model, settings(loraplus_ratio=8.0), 0.01)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {"lora_B" in names[p] for p in groups[1]["params"]} == {True}
    assert not any("lora_B" in names[p] for p in groups[0]["params"])
    assert {p for group in groups for p in group["params"]} == {p for p in model.parameters() if p.requires_grad}
    chosen = OptimizerSettings(0.01, schedule, 0.2, final, 0.0, 1.0)
    optimizer, rates = make_optimizer(groups, chosen, 20)
    seen = []
    for _ in range(20):
        seen.append(rates.get_last_lr())
        optimizer.step()
        rates.step()
    assert all(b == pytest.approx(8 * a) for a, b in seen) and max(a for a, _ in seen) == pytest.approx(0.01)
    set_step(rates, 7)  # as a resumed run does
    assert rates.get_last_lr() == pytest.approx(seen[7])
    assert len(LORA.parameter_groups(model, settings(), 0.01)) == 1


# Runs

RUN = ["--use_lora", "--max_train_steps", "4", "--eval_steps", "2", "--per_device_train_batch_size", "4"]
RUN += ["--checkpointing_steps", "2", "--keep_last_n_checkpoints", "-1", "--lora_rank", "8"]
RUNS = {
    "forms": ["--use_dora", "--use_rslora", "--lora_target_modules", "attention", "--lora_layers", "0-1", "3",
              "--loraplus_ratio", "4"],
    "pissa": ["--init_lora_weights", "pissa", "--lora_target_modules", "mlp"],
    "in full": ["--modules_to_save", "lm_head", "--lora_target_modules", "embed_tokens", "v_proj"],
    "biases": ["--lora_bias", "all"],
}  # fmt: skip


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """The bundled model with biases in attention."""
    folder = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(TINY_MODEL, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_continues_merges_and_loads_with_plain_peft(name, train, tmp_path, biased, capsys):
    model = biased if name == "biases" else TINY_MODEL
    held_out = write_conversations(tmp_path / "heldout.jsonl", "reverse", 12, seed=3, long_every=4)
    words = [*RUN, *RUNS[name], "--validation_file", str(held_out)]
    run = train("run", *words, model=model)
    assert run.code == 0 and "packed, rows" in run.out, run.err
    base_loss, loss = run.summary["base_eval_loss"], run.summary["final_eval_loss"]
    assert run.summary["initial_eval_loss"] == pytest.approx(base_loss, rel=1e-5) and loss < 0.98 * base_loss

    # Plain PEFT on the untouched base; without the adapter's file it is the base.
    base = AutoModelForCausalLM.from_pretrained(model)
    assert plain_loss(base, held_out) == pytest.approx(base_loss, rel=1e-5)
    tuned = PeftModel.from_pretrained(base, run.folder).eval()
    assert plain_loss(tuned, held_out) == pytest.approx(loss, rel=1e-5)
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)("green red blue")["input_ids"]])
    with torch.no_grad():
        logits = tuned(ids).logits
        weights = load_file(run.folder / "adapter_model.safetensors")
        damaged = tmp_path / "damaged"
        shutil.copytree(run.folder, damaged, ignore=shutil.ignore_patterns("checkpoints"))
        save_file({key: value * 1.2 for key, value in weights.items()}, damaged / "adapter_model.safetensors")
        changed = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), damaged).eval()
        assert (changed(ids).logits - logits).abs().max() > 1e-2

    # Merged, also where head and embedding share a weight.
    assert merge_main(["--adapter", str(run.folder), "--output", str(tmp_path / "merged")]) == 0, capsys.readouterr()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-3, atol=1e-3)

    # Served here beside the base, or refused.
    if name == "biases":
        with pytest.raises(InputError, match="trains the base's biases"):
            open_instruct.load(str(run.folder))
    else:
        served = open_instruct.load(str(run.folder))
        with torch.no_grad():
            torch.testing.assert_close(served.adapters.use("run")(ids).logits, logits, rtol=1e-4, atol=1e-4)
            expected = AutoModelForCausalLM.from_pretrained(model)(ids).logits
            torch.testing.assert_close(served.adapters.use("base")(ids).logits, expected, rtol=1e-4, atol=1e-4)

    # Resumed after step 2: the same curve and the same bits.
    for file in ("summary.json", "loss.png", "adapter_model.safetensors", "adapter_config.json"):
        (run.folder / file).unlink()
    shutil.rmtree(run.folder / "checkpoints" / "step_4")
    again = train("run", *words, "--resume_from_checkpoint", model=model)
    assert again.code == 0, again.err
    assert without_measurements(again.metrics) == without_measurements(run.metrics)
    resumed = load_file(run.folder / "adapter_model.safetensors")
    assert resumed.keys() == weights.keys() and all(torch.equal(resumed[key], weights[key]) for key in weights)

    # Continued with the adapter's own settings: it starts where it ended, and the base is still the base.
    words = ["--max_train_steps", "1", "--validation_file", str(held_out), "--adapter_name_or_path", str(run.folder)]
    on = train("on", *words, model=model)
    assert on.code == 0, on.err
    assert on.summary["initial_eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert on.summary["base_eval_loss"] == pytest.approx(base_loss, rel=1e-5)
    kept = [json.loads((folder / "adapter_config.json").read_text()) for folder in (run.folder, on.folder)]
    names = ("r", "lora_alpha", "use_dora", "use_rslora", "bias", "modules_to_save", "layers_to_transform")
    assert [kept[0][key] for key in names] == [kept[1][key] for key in names]
    assert sorted(kept[0]["target_modules"]) == sorted(kept[1]["target_modules"])


def test_a_base_in_one_process_is_clean_for_the_next_run(tmp_path, data_file):
    """As in a study: runs share a base, but not one that a run has changed."""
    from open_instruct.training import base_model, preemption, run

    bases, losses = base_model.Bases(), []
    for number, words in enumerate((["--modules_to_save", "lm_head"], [])):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags, given = parse([
            "--model_name_or_path", str(TINY_MODEL), "--train_file", str(data_file), "--validation_fraction", "0.2",
            "--output_dir", str(tmp_path / str(number)), "--dataset_skip_cache", "--num_sample_answers", "0",
            "--use_lora", "--max_train_steps", "1", "--max_eval_samples", "8", *words,
        ])  # fmt: skip
        with preemption.RunGuard() as guard:
            losses.append(run.run(flags, given, guard, bases)["base_eval_loss"])
    assert len(bases.loaded) == 1 and losses[0] == losses[1]


def test_a_foreign_adapters_settings_are_adopted_or_refused(tmp_path, data_file, capsys):
    tuned = get_peft_model(
        tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "o_proj"], layers_to_transform=1, use_rslora=True)
    )
    values = LORA.adopt(tuned.peft_config["default"].to_dict() | {"target_modules": ["o_proj", "q_proj"]}, False)
    assert values["lora_layers"] == ["1"] and values["use_rslora"] is True and values["lora_rank"] == 3
    assert values["lora_target_modules"] == ["o_proj", "q_proj"] and "modules_to_save" not in values
    tuned.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    good = json.loads(path.read_text())
    words = ["--train_file", str(data_file), "--output_dir", str(tmp_path / "on"), "--model_name_or_path", "m"]
    words += ["--adapter_name_or_path", str(tmp_path / "adapter")]
    bad = {"target_modules": [1], "modules_to_save": {"a": 1}, "bias": "some", "use_dora": "yes"}
    for key, value in bad.items():
        path.write_text(json.dumps({**good, key: value, "base_model_name_or_path": "m"}))
        assert finetune(words) == 2
        assert "the adapter's settings" in capsys.readouterr().err, key
    path.write_text(json.dumps({**good, "base_model_name_or_path": "m"}))
    assert finetune([*words, "--use_lora", "--init_lora_weights", "pissa"]) == 2
    assert "the trained adapter is the start" in capsys.readouterr().err
    assert finetune([*words, "--use_lora", "--lora_target_modules", "mlp"]) == 2
    assert "contradicts" in capsys.readouterr().err
