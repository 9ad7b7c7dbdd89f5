"""Quantised bases: gradients against the dequantised model's, training, resuming, evaluating, merging, refusals."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from docs.make_quantised import BACKENDS, BLOCK, INT8, NF4, checkpoint, in_fp8, in_int8, linear_weights, torchao
from open_instruct import evaluate_peft, merge_peft
from open_instruct.errors import InputError
from open_instruct.flags.quantisation import form_of_base
from open_instruct.model.gradient_probe import check_gradient, compare_gradients, gradient_at, slopes
from open_instruct.model.loading import load_config, load_model
from open_instruct.model.memory import bytes_of
from open_instruct.model.quantised import (
    dequantised,
    dequantised_weight,
    describe_quantised,
    quantised_layers,
    weight_by_identity,
)
from tests.conftest import TINY_MODEL, modest_flags, write_conversations

BNB_8, BNB_4 = {"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
QUANTO = {"quant_method": "quanto", "weights": "int8"}
WRONG_BACKWARD = torchao("Int8DynamicActivationInt8WeightConfig")
PACKAGES = {"torchao": "torchao", "quanto": "optimum.quanto", "compressed-tensors": "compressed_tensors"}
WITHOUT_BACKWARD = "torchao, int8 weights and activations"
SHORT = ("--max_train_steps", "6", "--per_device_train_batch_size", "8", "--dtype", "float32")


def needs(configuration: dict) -> None:
    """Skip a test where the package of a configuration is not installed."""
    pytest.importorskip(PACKAGES.get(configuration.get("quant_method", ""), "bitsandbytes"))


def load(configuration: dict | None, model=TINY_MODEL):
    """A base in a quantised form, in float32 otherwise."""
    form = configuration and form_of_base(None, json.dumps(configuration), None)
    return load_model(str(model), load_config(str(model)), torch.float32, "sdpa", form)


@pytest.fixture(scope="module")
def tokens():
    """Ids [1, T] for gradients."""
    return torch.arange(3, 19)[None]


@pytest.fixture
def held_out(tmp_path):
    """Conversations to measure on."""
    return write_conversations(tmp_path / "held_out.jsonl", "reverse", 20)


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine of the angle between two tensors."""
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.title != WITHOUT_BACKWARD], ids=lambda b: b.title)
def test_the_gradient_is_that_of_the_dequantised_model(backend, tmp_path, tokens):
    """The probe's figure, and the whole gradient of a model of plain weights."""
    if not backend.is_installed:
        pytest.skip(f"{backend.package} is not installed")
    folder = backend.write(tmp_path / "model") if backend.write else TINY_MODEL
    model = load(backend.configuration, folder)
    figures = check_gradient(model, backend.title)
    embeddings = model.get_input_embeddings()(tokens).detach()
    gradient = gradient_at(model, embeddings, tokens)
    plain = model
    if figures is not None:
        assert figures.cosine > 0.999 and figures.norm_ratio == pytest.approx(1, abs=0.01)
        assert figures.num_layers == 28 and figures.reference == "dequantised weights"
        plain = dequantised(model)
    assert not quantised_layers(plain) and not getattr(plain, "is_quantized", False)
    assert cosine(gradient, gradient_at(plain, embeddings, tokens)) > 0.99
    # Another model's gradient is told from it.
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight.mul_(-1)
    assert cosine(gradient, gradient_at(plain, embeddings, tokens)) < 0.99


@pytest.mark.parametrize("break_it", ["detached", "scaled", "rotated", "nothing"])
def test_a_base_whose_backward_is_wrong_is_refused(break_it):
    """Values are as before, so that only the gradient shows it. With `nothing` broken, the same code passes."""
    pytest.importorskip("bitsandbytes")
    model = load(NF4)
    for name, layer in quantised_layers(model).items():
        if "mlp" in name or break_it == "scaled":
            layer.forward = broken(layer.forward, break_it)
    if break_it == "nothing":
        assert check_gradient(model, "nf4").cosine > 0.999
        return
    with pytest.raises(InputError, match=r"nf4\) passes no right gradient to its input \(cosine -?0\.\d+ to dequanti"):
        check_gradient(model, "nf4")


def broken(forward, how: str):
    """A layer's forward pass with the same values and another derivative."""

    def compute(inputs):
        outputs = forward(inputs)
        if how == "detached":
            return outputs.detach()
        if how == "scaled":
            return outputs.detach() + 4 * (outputs - outputs.detach())
        if how == "rotated":
            return outputs.detach() + (outputs - outputs.detach()).roll(1, dims=-1)
        return outputs

    return compute


def test_a_base_that_passes_no_gradient_at_all_is_refused():
    pytest.importorskip("bitsandbytes")
    model = load(NF4)
    forward = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits.detach())
    assert compare_gradients(model).cosine == 0
    with pytest.raises(InputError, match=r"cosine 0\.0000"):
        check_gradient(model, "nf4")


def test_a_base_whose_kernels_refuse_training_is_refused(monkeypatch):
    """As gptqmodel's for inference do. Here one layer refuses, and the model is left in evaluation mode."""
    pytest.importorskip("bitsandbytes")
    model = load(NF4)
    layer = model.model.layers[1].mlp.down_proj
    train = type(layer).train

    def refuse(self, mode=True):
        if mode and self is layer:
            raise NotImplementedError("an inference-only kernel")
        return train(self, mode)

    monkeypatch.setattr(type(layer), "train", refuse)
    with pytest.raises(InputError, match=r"nf4\) can't be trained through \(.*an inference-only kernel\): choose"):
        check_gradient(model, "nf4")
    assert not model.training


def test_finite_differences_tell_a_right_gradient_from_a_wrong_one(tokens):
    """They stand in where weights have no known values."""
    model = load(None)
    embeddings = model.get_input_embeddings()(tokens).detach()
    gradient = gradient_at(model, embeddings, tokens)
    assert cosine(*slopes(model, embeddings, tokens, gradient)) > 0.99
    for layer in model.model.layers:
        layer.mlp.forward = broken(layer.mlp.forward, "detached")
    assert cosine(*slopes(model, embeddings, tokens, gradient_at(model, embeddings, tokens))) < 0.9


@pytest.mark.parametrize("configuration", [BNB_8, BNB_4, INT8, QUANTO], ids=["8bit", "fp4", "torchao", "quanto"])
def test_weights_are_found_from_what_a_layer_computes(configuration):
    """What a backend says of its weights is what a layer makes of the identity matrix."""
    needs(configuration)
    layer = load(configuration).model.layers[0].mlp.gate_proj
    said, found = dequantised_weight(layer).float(), weight_by_identity(layer).float()
    assert torch.allclose(said, found, atol=2e-3 * float(said.abs().max()))
    assert not torch.allclose(said.roll(1, 0), found, atol=2e-3 * float(said.abs().max()))


@pytest.mark.parametrize("quantise", [in_fp8, in_int8], ids=["fp8", "compressed-tensors"])
def test_checkpoints_that_kernels_have_no_derivative_for_are_dequantised(quantise, tmp_path):
    if quantise is in_int8:
        pytest.importorskip("compressed_tensors")
    original = load(None).state_dict()
    tensors = {name: original[name].clone() for name in linear_weights(original)}
    quantise(tensors)
    loaded = load(None, checkpoint(tmp_path / "model", quantise)).state_dict()
    for name in linear_weights(original):
        if quantise is in_fp8:
            scale = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        else:
            scale = tensors[f"{name}_scale"]
        assert torch.allclose(loaded[name], tensors[name].float() * scale, atol=1e-6)
        assert not torch.equal(loaded[name], original[name])


def test_skipped_modules_stay_whole_besides_the_head():
    pytest.importorskip("bitsandbytes")
    config = load_config(str(TINY_MODEL))
    for form in (form_of_base("4bit", None, ["gate_proj"]), form_of_base(None, json.dumps(INT8), ["gate_proj"])):
        if "torchao" in form:
            pytest.importorskip("torchao")
        model = load_model(str(TINY_MODEL), config, torch.float32, "sdpa", form)
        layers = quantised_layers(model)
        with pytest.raises(InputError, match="gate_porj: the model has no such module"):
            load_model(str(TINY_MODEL), config, torch.float32, "sdpa", form.replace("gate_proj", "gate_porj"))
        assert len(layers) == 24 and not any("gate_proj" in name or "lm_head" in name for name in layers)
        text = describe_quantised(model, form, None)
        assert "24 linear layers quantised; whole are model.layers.0.mlp.gate_proj.weight" in text


def test_fused_experts_that_stay_whole_are_said(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    MixtralForCausalLM(MixtralConfig(vocab_size=99, num_hidden_layers=1, num_local_experts=2, **sizes)).save_pretrained(
        tmp_path
    )
    model = load(NF4, tmp_path)
    text = describe_quantised(model, json.dumps(NF4), None)
    assert "4-bit nf4: 4 linear layers quantised; whole are lm_head.weight, model.layers.0.mlp.gate.weight" in text
    assert "experts in one tensor stay in 32 bits (model.layers.0.mlp.experts.down_proj" in text
    assert check_gradient(model, "nf4").cosine > 0.999


def test_memory_counts_codes_and_scales():
    needs(INT8)
    whole, model = load(None), load(INT8)
    numbers = sum(layer.weight.numel() for layer in quantised_layers(model).values())
    rows = sum(layer.out_features for layer in quantised_layers(model).values())
    scales = 4 * rows
    assert bytes_of(whole) - bytes_of(model) == pytest.approx(3 * numbers - scales, rel=0.01)


@pytest.mark.parametrize(
    ("method", "configuration"),
    [
        ("prompt_tuning", BNB_8), ("prefix_tuning", BNB_4), ("p_tuning", INT8), ("lora", INT8), ("lora", QUANTO),
        ("prompt_tuning", None),
    ],
    ids=["8bit", "fp4", "torchao", "torchao-lora", "quanto-lora", "fp8 checkpoint"],
)  # fmt: skip
def test_runs_learn_resume_and_are_evaluated(method, configuration, train, tmp_path, held_out):
    model = TINY_MODEL
    flags = [f"--use_{method}", *modest_flags(method), *SHORT, "--validation_file", str(held_out)]
    if configuration is None:
        model = checkpoint(tmp_path / "model", in_fp8)
    else:
        needs(configuration)
        path = tmp_path / "quantisation.json"
        path.write_text(json.dumps(configuration))
        flags += ["--quantisation_config", str(path)]
    run = train("run", *flags, "--checkpointing_steps", "3", "--keep_last_n_checkpoints", "-1", model=model)
    assert run.code == 0, run.err
    assert run.summary["final_eval_loss"] < run.summary["base_eval_loss"]
    recorded = json.loads((run.folder / "run.json").read_text())
    if configuration is None:
        assert "dequantised when loaded" in run.out and recorded["quantisation"]["probe"] is None
    else:
        assert "gradient at the embeddings: cosine 1.0000" in run.out
        assert recorded["quantisation"]["probe"]["cosine"] > 0.999
        path.unlink()  # the content is recorded, not the file's name
        flags[-1] = recorded["flags"]["quantisation_config"]["value"]
    step = str(run.folder / "checkpoints" / "step_3")
    again = train("again", *flags, "--resume_from_checkpoint", step, model=model)
    assert again.code == 0, again.err
    weights = "adapter_model.safetensors"
    assert (again.folder / weights).read_bytes() == (run.folder / weights).read_bytes()
    figures = evaluated(run.folder, held_out, tmp_path / "figures")
    # LLM.int8() keeps the columns whole in which any of the row's tokens is large, so examples change each other.
    rounding = 5e-3 if configuration == BNB_8 else 1e-5
    assert figures["a"]["loss"]["value"] == pytest.approx(run.summary["final_eval_loss"], abs=rounding)
    assert figures["base"]["loss"]["value"] == pytest.approx(run.summary["base_eval_loss"], abs=rounding)


def evaluated(adapter, data, folder) -> dict:
    """Losses of an adapter and its base."""
    words = ["--adapter", f"a={adapter}", "--file", str(data), "--metrics", "loss", "--output_dir", str(folder)]
    assert evaluate_peft.main([*words, "--dtype", "float32"]) == 0
    return json.loads((folder / "evaluation.json").read_text())["figures"]


def test_an_adapter_is_continued_and_merged_on_its_quantised_base(train, tmp_path, held_out):
    needs(INT8)
    flags = ["--use_lora", "--lora_dropout", "0", *SHORT, "--validation_file", str(held_out)]
    run = train("run", *flags, "--quantisation_config", json.dumps(INT8), "--skip_modules", "down_proj")
    assert run.code == 0 and "24 linear layers quantised" in run.out, run.err
    more = train("more", "--adapter_name_or_path", str(run.folder), "--max_train_steps", "1")
    assert more.code == 0 and "24 linear layers quantised" in more.out, more.err
    assert merge_peft.main(["--adapter", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    words = ["--model_name_or_path", str(tmp_path / "merged"), "--file", str(held_out), "--metrics", "loss"]
    assert evaluate_peft.main([*words, "--output_dir", str(tmp_path / "figures")]) == 0
    figures = json.loads((tmp_path / "figures" / "evaluation.json").read_text())["figures"]
    assert figures["base"]["loss"]["value"] == pytest.approx(run.summary["final_eval_loss"], abs=1e-3)


def test_a_run_through_a_wrong_backward_is_refused(train):
    """Torchao's int8 activations have no derivative: only residual connections pass a gradient."""
    needs(WRONG_BACKWARD)
    run = train("run", "--use_prompt_tuning", *SHORT, "--quantisation_config", json.dumps(WRONG_BACKWARD))
    assert run.code == 2 and "passes no right gradient to its input (cosine 0.0" in run.err
    assert run.err.strip().count("\n") == 0 and not (run.folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quantisation_config", "{}"], "it names no quant_method"),
        (
            ["--quantisation_config", '{"quant_method": "bitsandbytes"}'],
            "load_in_8bit it needs one",
        ),
        (["--quantisation_config", "none.json"], "none.json"),
        (["--quantisation_config", '{"quant_method": "nope"}'], "Unknown quantization type, got nope"),
        (["--quantisation_config", '{"load_in_8bit": true, "threshold": 1}'], "it has no threshold: known are"),
        (["--quantisation_config", '{"load_in_8bit": true}', "--load_in_4bit"], "it excludes --load_in_4bit"),
        (["--quantisation_config", '{"load_in_8bit": true}', "--use_qlora"], "QLoRA holds its base in 4 bits"),
        (["--skip_modules", "lm_head"], "nothing is quantised"),
        (
            ["--quantisation_config", '{"load_in_8bit": true, "llm_int8_skip_modules": ["a"]}', "--skip_modules", "b"],
            "it has llm_int8_skip_modules already",
        ),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said(flags, message, train):
    pytest.importorskip("bitsandbytes")
    run = train("run", *([] if "--use_qlora" in flags else ["--use_lora"]), *SHORT, *flags)
    assert run.code == 2 and message in run.err and run.err.strip().count("\n") == 0


def test_quantised_weights_are_not_trained_in_full_or_quantised_twice(train, tmp_path):
    model = checkpoint(tmp_path / "model", in_fp8)
    run = train("full", *SHORT, model=model)
    assert run.code == 2 and "quantised weights can't be trained in full" in run.err
    run = train("twice", "--use_lora", "--load_in_8bit", *SHORT, model=model)
    assert run.code == 2 and "is quantised already (fp8)" in run.err
