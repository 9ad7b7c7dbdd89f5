"""What is loaded fits and is finite, or is refused: bases, adapters, further arguments; every control must load."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GenerationConfig,
    LlamaModel,
    MarianConfig,
    PegasusConfig,
    ViTConfig,
)

from open_instruct.adapters import loaded
from open_instruct.adapters.base_changes import BaseChanges
from open_instruct.adapters.folders import read_folder
from open_instruct.adapters.generation import check_generation, greedy_answers
from open_instruct.adapters.loaded import Adapters, load_adapted_base
from open_instruct.errors import InputError
from open_instruct.files import json_text
from open_instruct.model import loading
from open_instruct.model.configuration import parse_arguments
from open_instruct.model.fit import INDEX
from open_instruct.model.weights import not_finite
from open_instruct.quiet import silence_transformers
from tests.conftest import TINY_MODEL
from tests.tiny_models import ARCHITECTURES, random_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
silence_transformers()


def copy_of_base(tmp_path, change=None, **config):
    """The tiny model with changed tensors, and with changed values in its config.json."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    values = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))
    if change:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


def load(folder, early=True, **options):
    """Load a base as the trainer does: the cheap check first."""
    arguments = options.get("arguments")
    config = loading.load_config(str(folder), arguments)
    loading.check_weights(str(folder), options.get("allow_pickle", False))
    if early:
        loading.check_fit_early(str(folder), config, arguments)
    return loading.load_model(str(folder), config, torch.float32, None, **options)


def prefixed(tensors):
    return {f"zz.{name}": tensor for name, tensor in tensors.items()}


def half(tensors):
    return {name: tensor for number, (name, tensor) in enumerate(sorted(tensors.items())) if number % 2}


def with_value(value):
    """Put one number into the middle of one tensor."""

    def change(tensors):
        tensors["model.layers.2.mlp.up_proj.weight"].view(-1)[1234] = value
        return tensors

    return change


def cut_rows(tensors):
    return tensors | {"model.layers.0.mlp.up_proj.weight": tensors["model.layers.0.mlp.up_proj.weight"][:100].clone()}


BASES = {
    "prefixed": (prefixed, {}, "39 missing: lm_head.weight, model.embed_tokens.weight, .* and 36 more; 38 without"),
    "half": (half, {}, "20 missing: "),
    "one foreign": (lambda tensors: tensors | {"extra": torch.zeros(2)}, {}, "1 without a place in the model: extra"),
    "deeper": (None, {"num_hidden_layers": 8}, "36 missing: model.layers.4"),
    "shallower": (None, {"num_hidden_layers": 2}, "18 without a place in the model: model.layers.2"),
    "narrower": (None, {"hidden_size": 64}, r"of another shape: .*\[907, 128\], the model needs \[907, 64\]"),
    "vocabulary": (None, {"vocab_size": 950}, r"1 of another shape: .* needs \[950, 128\]"),
    "cut tensor": (cut_rows, {}, r"1 of another shape: .*\[100, 128\]"),
    "no head": (None, {"tie_word_embeddings": False}, "1 missing: lm_head.weight"),
    "gemma": (None, {"model_type": "gemma"}, "model_type gemma, which makes GemmaForCausalLM, but architectures Llama"),
    "qwen2": (None, {"model_type": "qwen2", "architectures": None}, "missing: model.layers.0.self_attn.k_proj.bias"),
    "bert": (None, {"model_type": "bert"}, "bert is an encoder"),
}
VALUES = {"nan": float("nan"), "infinite": float("inf"), "negative infinite": float("-inf")}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_does_not_fit_is_refused_before_data_and_when_loaded(case, tmp_path):
    change, config, says = BASES[case]
    folder = copy_of_base(tmp_path, change, **config)
    for early in (True, False):
        with pytest.raises(InputError, match=says):
            load(folder, early)


@pytest.mark.parametrize("case", VALUES)
def test_a_base_that_is_not_finite_is_refused(case, tmp_path):
    with pytest.raises(InputError, match="NaN or infinite: model"):
        load(copy_of_base(tmp_path, with_value(VALUES[case])))


@pytest.mark.parametrize("quantise", ["4bit", "8bit"])
def test_quantised_bases_load_and_are_checked(quantise, tmp_path):
    pytest.importorskip("bitsandbytes")
    assert load(TINY_MODEL, quantise=quantise).is_quantized
    with pytest.raises(InputError, match="not finite"):
        load(copy_of_base(tmp_path, with_value(float("nan"))), quantise=quantise)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match="do not fit"):
        load(copy_of_base(tmp_path, half), quantise=quantise)


def test_16_bits_that_can_not_hold_a_weight_are_named(tmp_path):
    folder = copy_of_base(tmp_path, with_value(1e6))
    config = loading.load_config(str(folder))
    assert load(folder) is not None
    with pytest.raises(InputError, match="float16 ends at 65,504"):
        loading.load_model(str(folder), config, torch.float16, None)


def test_extremes_see_every_place_and_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for position in (0, 500, 999):
            values = torch.zeros(1000, dtype=dtype)
            assert not not_finite([("a", values)])
            values[position] = float("nan")
            assert not_finite([("a", values)]) == ["a"]
    others = [torch.ones(3, dtype=torch.int8), torch.empty(0), torch.empty(3, device="meta")]
    assert not not_finite([("a", tensor) for tensor in others])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_families_still_load(architecture, tmp_path):
    model = random_model(architecture)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_headless_file_loads_where_the_head_is_tied_and_pickle_is_checked_too(tmp_path):
    body = LlamaModel.from_pretrained(TINY_MODEL)
    body.save_pretrained(tmp_path / "body")
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "body" / WEIGHTS))
    assert load(tmp_path / "body").lm_head.weight.std() > 0
    folder = copy_of_base(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load(folder, allow_pickle=True) is not None
    torch.save(prefixed(tensors), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="do not fit"):
        load(folder, allow_pickle=True)


def sharded(tmp_path):
    """The tiny model in several files."""
    folder = copy_of_base(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="1MB")
    return folder, folder / INDEX, sorted(folder.glob("model-*.safetensors"))


def test_shards_are_all_there_once(tmp_path):
    folder, index, shards = sharded(tmp_path)
    assert len(shards) > 2 and load(folder) is not None
    content = json.loads(index.read_text())
    kept = shards[1].read_bytes()

    def refused(says):
        with pytest.raises(InputError, match=says):
            load(folder)

    shards[1].unlink()
    refused(f"names files that are not there \\({shards[1].name}\\)")
    shards[1].write_bytes(kept[:2000])
    refused(f"{shards[1].name} can't be used")
    shards[1].write_bytes(shards[0].read_bytes())
    refused(f"are in {shards[0].name} and in {shards[1].name}")
    shards[1].write_bytes(kept)
    for damaged in ('{"weight_map": 3}', "[]", "{", '{"weight_map": {"a": 5}}', '{"weight_map": {}}'):
        index.write_text(damaged)
        with pytest.raises(InputError):
            load(folder)
    content["weight_map"]["extra"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    refused("names files outside of its folder")
    del content["weight_map"]["extra"]
    without = {name: file for name, file in content["weight_map"].items() if file != shards[1].name}
    index.write_text(json.dumps({**content, "weight_map": without}))
    refused("missing: ")


@pytest.mark.parametrize("kind, says", [
    (PegasusConfig, "encoder-decoder"), (MarianConfig, "encoder-decoder"), (BertConfig, "encoder"),
    (ViTConfig, "no causal language model"),
])  # fmt: skip
def test_other_kinds_of_models_are_refused_by_their_configuration_alone(kind, says, tmp_path, train):
    kind().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=says):
        load_adapted_base(str(tmp_path / "other"), "auto")
    run = train("run", "--use_lora", model=tmp_path / "other")
    assert run.code == 2 and says in run.err and run.err.count("\n") == 1 and not run.folder.exists()


def adapter(tmp_path, kind, change=None, **settings):
    """A random adapter on the tiny model, with changed tensors and settings."""
    configs = {
        "lora": LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules="all-linear", init_lora_weights=False),
        "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
        "prefix": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5),
    }
    folder = tmp_path / kind
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL), configs[kind])
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    if change:
        save_file(change(load_file(file)), file)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def first_nan(tensors):
    next(iter(tensors.values())).view(-1)[7] = float("nan")
    return tensors


def renamed(tensors):
    return {f"foreign.{name}": tensor for name, tensor in tensors.items()}


def one_layer_less(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}


def one_layer_more(tensors):
    return tensors | {name.replace(".layers.3.", ".layers.4."): tensor.clone() for name, tensor in tensors.items()}


def dimension(shape):
    return lambda tensors: {"prompt_embeddings": torch.zeros(shape)}


ADAPTERS = {
    "lora nan": ("lora", first_nan, {}, "not finite"),
    "lora foreign": ("lora", renamed, {}, "missing: .*without a place"),
    "lora half": ("lora", half, {}, "28 missing: "),
    "lora shallow": ("lora", one_layer_less, {}, "14 missing: .*layers.3"),
    "lora deep": ("lora", one_layer_more, {}, "14 without a place .*layers.4"),
    "lora rank": ("lora", None, {"r": 8}, "adapter x, .* can't be used"),
    "lora empty": ("lora", lambda tensors: {}, {}, "56 missing"),
    "lora pattern": ("lora", None, {"target_modules": "((("}, "pattern .*can't be used"),
    "lora endless pattern": ("lora", None, {"target_modules": "(.*.*.*.*)*(.*.*.*)*zz"}, "still computing"),
    "lora no layers": ("lora", None, {"target_modules": ["nowhere"]}, "can't be used"),
    "lora base": ("lora", None, {"base_model_name_or_path": 5}, "base_model_name_or_path is 5"),
    "prompt nan": ("prompt", first_nan, {}, "not finite"),
    "prompt foreign": ("prompt", renamed, {}, "1 missing: prompt_embeddings"),
    "prompt more": ("prompt", lambda tensors: tensors | {"x": torch.zeros(1)}, {}, "1 without a place .* x"),
    "prompt 0": ("prompt", dimension(()), {}, "holds one numbers"),
    "prompt 1": ("prompt", dimension((640,)), {}, "holds 640 numbers"),
    "prompt 3": ("prompt", dimension((1, 5, 128)), {}, "holds 1 × 5 × 128 numbers"),
    "prompt width": ("prompt", dimension((5, 64)), {}, "holds 5 × 64 numbers"),
    "prompt length": ("prompt", None, {"num_virtual_tokens": 10**12}, "needs 1000000000000 × 128"),
    "prompt none": ("prompt", None, {"num_virtual_tokens": None}, "num_virtual_tokens is None"),
    "prompt true": ("prompt", None, {"num_virtual_tokens": True}, "num_virtual_tokens is True"),
    "prefix nan": ("prefix", first_nan, {}, "not finite"),
    "prefix depth": ("prefix", dimension((5, 512)), {}, "holds 5 × 512 numbers"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused_everywhere(case, tmp_path, train):
    kind, change, settings, says = ADAPTERS[case]
    folder = adapter(tmp_path, kind, change, **settings)
    with pytest.raises(InputError, match=says), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing but the line
        Adapters(load_adapted_base(str(TINY_MODEL), "float32"), [read_folder("x", str(folder))])
    if "endless" in case:
        return  # a second time would cost another second
    run = train("run", "--adapter_name_or_path", str(folder), "--max_train_steps", "1")
    assert run.code == 2 and run.err.startswith("error: ") and run.err.count("\n") == 1, run.err
    assert not run.folder.exists()


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("damage", ["cut", "empty", "pickled", "folder"])
def test_damaged_files_of_adapters_are_one_line(kind, damage, tmp_path, train):
    folder = adapter(tmp_path, kind)
    file = folder / "adapter_model.safetensors"
    tensors, data = load_file(file), file.read_bytes()
    file.unlink()
    if damage == "pickled":
        torch.save(tensors, file)
    elif damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(InputError):
        Adapters(load_adapted_base(str(TINY_MODEL), "float32"), [read_folder("x", str(folder))])
    run = train("run", "--adapter_name_or_path", str(folder), "--max_train_steps", "1")
    assert run.code == 2 and run.err.count("\n") == 1, run.err


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_control_adapters_that_fit_are_used_and_continued(kind, tmp_path, train):
    folder = adapter(tmp_path, kind)
    adapters = Adapters(load_adapted_base(str(TINY_MODEL), "float32"), [read_folder("x", str(folder))])
    ids = torch.tensor([[3, 4, 5]])
    base = adapters.use("base")(input_ids=ids).logits
    assert not torch.equal(adapters.use("x")(input_ids=ids).logits[:, -3:], base)
    run = train("run", "--adapter_name_or_path", str(folder), "--max_train_steps", "1")
    assert run.code == 0, run.err


@pytest.mark.parametrize("flags", [
    {"model_revision": {"value": 5}}, {"model_revision": 5}, {"additional_model_arguments": {"value": {}}},
    {"additional_model_arguments": {"value": "{"}}, {"use_qlora": {"value": "yes"}}, [], "text",
])  # fmt: skip
def test_a_damaged_record_of_a_run_is_one_line(flags, tmp_path):
    folder = adapter(tmp_path, "prompt")
    (folder / "run.json").write_text(json.dumps({"flags": flags}))
    with pytest.raises(InputError):
        load_adapted_base(str(TINY_MODEL), "float32", [read_folder("x", str(folder))])


ARGUMENTS = {
    '{"no_such_thing": 3}': "neither an attribute",
    '{"rms_norm_epss": 1e-5}': "did you mean rms_norm_eps",
    '{"device_map": "auto"}': "docs/distributed.md",
    '{"revision": "x"}': "use --model_revision",
    '{"dtype": "float16"}': "use --dtype",
    '{"torch_dtype": "float16"}': "use --dtype",
    '{"quantization_config": {}}': "use --load_in_4bit",
    '{"trust_remote_code": true}': "use --trust_remote_code",
    '{"state_dict": {}}': "weights come from",
    '{"cache_dir": "x"}': "HF_HOME",
    '{"model_type": "gpt2"}': "belongs to the weights",
    '{"rms_norm_eps": NaN}': "not finite",
    '{"rms_norm_eps": "small"}': "expected float",
    '{"rms_norm_eps": -5.0}': "computes what is not finite",
    '{"rope_theta": 0}': "not a positive number",
    '{"rope_theta": "big"}': "not a positive number",
    '{"rope_scaling": {"rope_type": "nonsense", "factor": 2}}': "is none of default, ",
    '{"rope_scaling": 7}': "is not an object",
    '{"rope_parameters": {"rope_type": "linear", "factor": -1}}': "not a positive number",
    '{"num_hidden_layers": 3}': "do not fit .*drop --additional_model_arguments",
    '{"num_hidden_layers": -1}': "num_hidden_layers",
    '{"hidden_act": "nonsense"}': "can't be loaded",
    '{"attention_dropout": 5}': "dropout probability",
    '{"num_attention_heads": 3}': "not a multiple",
    '{"attn_implementation": "nonsense"}': "can't be loaded",
    '{"attn_implementation": 5}': "can't be loaded",
    "[]": "no JSON object",
    "[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("text", ARGUMENTS, ids=lambda text: text[:40])
def test_arguments_that_a_base_can_not_have_are_one_line(text):
    with pytest.raises(InputError, match=ARGUMENTS[text]) as caught:
        load(TINY_MODEL, arguments=text)
    assert "\n" not in str(caught.value)


def test_arguments_reach_the_model():
    plain, ids = load(TINY_MODEL), torch.tensor([[5, 6, 7, 8]])
    assert load(TINY_MODEL, arguments='{"attn_implementation": "eager"}').config._attn_implementation == "eager"
    changed = load(TINY_MODEL, arguments='{"rope_theta": 5.0, "rms_norm_eps": 0.5}')
    assert changed.config.rope_parameters["rope_theta"] == 5.0 and changed.config.rms_norm_eps == 0.5
    assert not torch.allclose(changed.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    scaled = load(TINY_MODEL, arguments='{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}')
    assert torch.allclose(2 * scaled.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (plain, changed, scaled)]
    assert not torch.allclose(logits[0], logits[1], atol=1e-2) and not torch.allclose(logits[0], logits[2], atol=1e-2)
    assert parse_arguments(None) == {} and load(TINY_MODEL, arguments="{}").config.rms_norm_eps == 1e-6


def test_what_an_adapter_was_trained_with_is_what_it_is_used_with(tmp_path, train, capsys):
    from open_instruct.adapters.merging import merge

    config = tmp_path / "config"
    config.mkdir()
    values = json.loads((TINY_MODEL / CONFIG).read_text())
    (config / CONFIG).write_text(json.dumps({**values, "max_position_embeddings": 777}))
    text = '{"rms_norm_eps": 0.05, "attn_implementation": "flash_attention_2"}'
    plain = train("plain", "--use_lora", "--max_train_steps", "2")
    flags = ["--additional_model_arguments", '{"rms_norm_eps": 0.05}', "--config_name", str(config)]
    run = train("run", "--use_lora", "--max_train_steps", "2", *flags, "--model_revision", "v2")
    assert run.code == 0 == plain.code, run.err
    assert plain.summary["base_eval_loss"] != run.summary["base_eval_loss"]
    settings = json.loads((run.folder / "adapter_config.json").read_text())
    assert settings["revision"] == "v2"
    folder = read_folder("x", str(run.folder))
    assert folder.base_changes == BaseChanges("v2", str(config), '{"rms_norm_eps": 0.05}')
    base = load_adapted_base(str(TINY_MODEL), "float32", [folder])
    assert base.config.rms_norm_eps == 0.05 and base.config.max_position_embeddings == 777
    with pytest.raises(InputError, match="different forms of the base"):
        load_adapted_base(str(TINY_MODEL), "float32", [folder, read_folder("y", str(plain.folder))])
    merge([str(run.folder)], str(tmp_path / "merged"))
    merged = json.loads((tmp_path / "merged" / CONFIG).read_text())
    assert merged["rms_norm_eps"] == 0.05 and merged["max_position_embeddings"] == 777
    more = train("more", "--adapter_name_or_path", str(run.folder), "--max_train_steps", "1")
    assert more.code == 0 and read_folder("z", str(more.folder)).base_changes == folder.base_changes, more.err
    other = ["--additional_model_arguments", '{"rms_norm_eps": 0.06}']
    against = train("against", "--adapter_name_or_path", str(run.folder), *other)
    assert against.code == 2 and "contradicts" in against.err
    new = train("new", "--adapter_name_or_path", str(plain.folder), *other, "--max_train_steps", "1")
    assert new.code == 0 and "was trained without --additional_model_arguments" in new.err
    capsys.readouterr()
    assert loaded.runnable(text) == '{"rms_norm_eps": 0.05}' and "can't run here" in capsys.readouterr().err
    shutil.rmtree(config)
    with pytest.raises(InputError, match="which is not there"):
        load_adapted_base(str(TINY_MODEL), "float32", [folder])


@pytest.mark.parametrize("decay", ["0", "100"])  # parameters of 1e38, and infinite ones
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_parameters_that_are_not_finite_are_no_result(steps, decay, train):
    rate = [
        "--learning_rate",
        "1e38",
        "--weight_decay",
        decay,
        "--warmup_ratio",
        "0",
        "--lr_scheduler_type",
        "constant",
    ]
    run = train("run", "--use_lora", *rate, "--max_train_steps", str(steps), "--checkpointing_steps", "1")
    assert run.code == 2 and "not" in run.err and "last good checkpoint: " in run.err, run.err
    assert run.summary is None and not (run.folder / "adapter_model.safetensors").exists()


@torch.no_grad()
def test_a_merge_that_computes_nan_is_not_verified():
    from open_instruct.adapters.merging import PROBES, Expected, verify

    model, tokenizer = load(TINY_MODEL), loaded.tokenizer_for(str(TINY_MODEL), [])
    probes = [tokenizer(text)["input_ids"] for text in PROBES]
    logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in probes]
    wanted = Expected({"x": logits}, {"x": greedy_answers(model, tokenizer, probes, 16)})
    assert verify(model, tokenizer, tokenizer, [], wanted, {})["largest_difference"] < 1e-5
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="differ from base"):
        verify(model, tokenizer, tokenizer, [], wanted, {})


@pytest.mark.parametrize("key, value", [("eos_token_id", "x"), ("eos_token_id", [2, "x"]), ("pad_token_id", 1.5)])
def test_token_ids_that_are_no_numbers_are_one_line(key, value, tmp_path):
    folder = copy_of_base(tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=key):
        load(folder)


WRONG = ["text", -1, [], {"a": 1}, True, None]


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_settings_of_generation_are_tried_before_anything_is_answered(value, tmp_path):
    """Any value of any of them: either a token can be written, or one line says which file is wrong."""
    folder = copy_of_base(tmp_path)
    path = folder / "generation_config.json"
    content = json.loads(path.read_text())
    names = sorted(vars(GenerationConfig()).keys() - {"transformers_version"})
    refused = []
    for name in names:
        path.write_text(json.dumps(content | {name: value}))
        try:
            model = load(folder)
            check_generation(model, "model")
        except InputError:
            refused.append(name)
        else:
            (answer,) = greedy_answers(model, loaded.tokenizer_for(str(folder), []), [[5, 6, 7]], 3)
            assert isinstance(answer, str), name
    assert bool(refused) == (value is not None), refused


def test_adapters_with_settings_that_compute_nan_or_need_a_package_are_one_line(tmp_path):
    for name, value in {"lora_alpha": float("nan"), "megatron_config": 5, "alora_invocation_tokens": 5}.items():
        folder = adapter(tmp_path, "lora", **{name: value})
        with pytest.raises(InputError):
            Adapters(load_adapted_base(str(TINY_MODEL), "float32"), [read_folder("x", str(folder))])


@pytest.mark.parametrize("losses, best", [
    ([float("nan"), 1.0, 0.5], 3), ([1.0, float("nan"), 2.0], 1), ([float("inf"), 3.0], 2), ([float("nan")], None),
])  # fmt: skip
def test_the_best_parameters_are_never_those_of_a_nan(losses, best):
    from accelerate import Accelerator

    from open_instruct.training.state import TrainState

    state, model, accelerator = TrainState(), torch.nn.Linear(1, 1), Accelerator(cpu=True)
    for step, loss in enumerate(losses, start=1):
        state.step = step
        state.keep_if_best(loss, model, accelerator)
    assert state.best_step == best


def test_json_has_no_nan():
    value = {"a": float("nan"), "b": [1.5, float("-inf"), {"c": (float("inf"), 2)}], "d": "NaN", "e": None}

    def refuse(token):
        raise AssertionError(token)

    assert json.loads(json_text(value), parse_constant=refuse) == {
        "a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": None,
    }  # fmt: skip
