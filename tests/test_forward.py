"""Which forward pass a run takes, what it refuses, and that the choice changes nothing but speed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from docs import make_capabilities
from open_instruct.command_line import parse
from open_instruct.data import packing
from open_instruct.errors import InputError
from open_instruct.methods import METHODS, Feature
from open_instruct.model import backends
from open_instruct.model.shared_prefix import Segments
from open_instruct.training import forward
from open_instruct.training.forward_settings import ForwardSettings
from open_instruct.training.settings import before_data
from tests.conftest import ROOT, TINY_MODEL, method_flags, modest_flags, no_dropout, without_measurements
from tests.tiny_models import COMMON, random_model, wrap

SETTINGS = ForwardSettings(
    packing=True, packing_requested=False, max_tokens_per_microbatch=None, attn_backend=None, use_flash_attn=True,
    max_length=64, num_virtual_tokens=5, train_batch_size=4, eval_batch_size=4,
    gradient_checkpointing=False, compile_layers=False,
)  # fmt: skip
SHORT = ["--max_train_steps", "3", "--eval_steps", "0"]


def changed(**changes: Any) -> ForwardSettings:
    """SETTINGS with changes."""
    return ForwardSettings(**{**SETTINGS.__dict__, **changes})


def choose(model: Any, method: Any, settings: ForwardSettings) -> forward.Forward:
    """The forward pass of one process on CPU, in float32."""
    return forward.choose_forward(model, method, settings, Accelerator(cpu=True), torch.float32, pad_token_id=0)


def of_kind(kind: str, **options: Any) -> Any:
    """A tiny model of an architecture that is not in the table of exact ones."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **options}))


UNPACKABLE = {
    "bloom": ({}, "does not go through transformers' AttentionInterface"),
    "gpt_oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2},
        "its attention uses s_aux",
    ),
    "lfm2": (
        {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
        "an example's loss depends on the example before it",
    ),
    "llama": ({"attention_dropout": 0.1}, "its attention uses dropout"),
    "nemotron": ({"num_key_value_heads": 2}, "loses the row's boundaries"),
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_a_model_that_packing_would_get_wrong_is_padded_and_says_why(kind):
    options, reason = UNPACKABLE[kind]
    model, method = wrap("lora", of_kind(kind, **options))
    own = model.get_base_model().config._attn_implementation
    chosen = choose(model, method, SETTINGS)
    assert (
        chosen.description.startswith("padded, 4 rows; the packed one would not be exact for this model")
        and reason in chosen.description
    )
    assert model.get_base_model().config._attn_implementation == own
    with pytest.raises(InputError, match="use --packing False"):
        choose(model, method, changed(packing_requested=True))
    with pytest.raises(InputError, match="--compile needs the packed forward pass"):
        choose(model, method, changed(compile_layers=True))


def test_the_probe_notices_a_wrong_position(monkeypatch):
    model, method = wrap("prefix_tuning", random_model("llama"))
    prompt = partial(method.soft_prompt, model)
    own = model.get_base_model().config._attn_implementation
    head, obstacle = forward.probe(model, prompt, "blocked", torch.float32)
    assert head == "linear" and not obstacle
    monkeypatch.setattr(
        packing, "pack", lambda rows, pack=packing.pack: (b := pack(rows)) | {"position_ids": b["position_ids"] + 1}
    )
    _, obstacle = forward.probe(model, prompt, "blocked", torch.float32)
    assert "differs from its own by" in obstacle
    assert model.get_base_model().config._attn_implementation == own


def test_the_probe_notices_a_leak_in_half_precision_too(monkeypatch):
    model, _ = wrap("lora", random_model("llama").bfloat16())

    def leaky(inputs):
        one_segment = (0, inputs.segments.bounds[-1][1])
        return backends.blocked(replace(inputs, segments=Segments((one_segment,), 0, 0)))

    monkeypatch.setitem(backends.BACKENDS, "leaky", leaky)
    _, obstacle = forward.probe(model, lambda: None, "leaky", torch.bfloat16)
    assert obstacle


def test_an_adapter_that_does_not_run_on_a_model_is_said():
    model, method = wrap(
        "prefix_tuning", of_kind("lfm2", num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"])
    )
    with pytest.raises(InputError, match="does not run on a lfm2 model"):
        choose(model, method, SETTINGS)


def test_the_bound_of_a_row():
    assert SETTINGS.max_row_tokens == 4 * 64 + 5  # what the padded micro-batch could hold
    assert changed(train_batch_size=16, max_length=2048).max_row_tokens == 4096 + 5
    assert changed(max_length=8192).max_row_tokens == 8192 + 5
    assert changed(max_tokens_per_microbatch=77).max_row_tokens == 77
    changed(max_tokens_per_microbatch=77).check_rows(72)
    with pytest.raises(
        InputError, match="has 73 tokens and 5 virtual ones: raise it to 78, or cut examples with --max_seq_length 72"
    ):
        changed(max_tokens_per_microbatch=77).check_rows(73)


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3"])
def test_packed_and_padded_runs_are_the_same_run(method, train):
    flags = [*modest_flags(method), *no_dropout(method), *SHORT, "--gradient_accumulation_steps", "2"]
    packed, padded = (
        train("packed", *flags, "--max_tokens_per_microbatch", "150"),
        train("padded", *flags, "--packing", "False"),
    )
    assert packed.code == padded.code == 0, packed.err + padded.err
    assert "forward pass: packed, rows of at most 150 tokens, attention by blocked" in packed.out
    assert "forward pass: padded, 8 rows; PEFT's own" in padded.out
    for a, b in zip(without_measurements(packed.metrics), without_measurements(padded.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("method", ["full", "lora", "prompt_tuning", "prefix_tuning"])
def test_packed_and_padded_runs_agree_in_bfloat16(method, train):
    """Under autocast; as far as two orders of evaluation do."""
    flags = [
        *modest_flags(method),
        *no_dropout(method),
        *SHORT,
        "--dtype",
        "bfloat16",
        "--max_train_steps",
        "2",
        "--lr_scheduler_type",
        "constant",
    ]
    packed, padded = train("packed", *flags), train("padded", *flags, "--packing", "False")
    assert packed.code == padded.code == 0, packed.err + padded.err
    assert "forward pass: packed" in packed.out
    for a, b in zip(packed.metrics[:2], padded.metrics[:2], strict=True):
        names = [name for name in ("loss", "grad_norm", "eval_loss") if name in a]
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=3e-2)


@pytest.mark.parametrize("kind, options, description", [
    ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "attn_pdrop": 0.0}, "packed, rows of"),
    ("bloom", {"n_head": 4, "n_layer": 2}, "padded, 8 rows; the packed one would not be exact for this model"),
    ("gpt_neox", {}, "packed, rows of"),
])  # fmt: skip
def test_whole_runs_on_architectures_with_other_names_for_their_layers(kind, options, description, train, tmp_path):
    folder = tmp_path / kind
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    of_kind(kind, **{**options, **ids, "vocab_size": len(tokenizer)}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = train(
        "run", "--use_prompt_tuning", "--gradient_checkpointing", *SHORT, "--num_sample_answers", "2", model=folder
    )
    assert run.code == 0, run.err
    assert f"forward pass: {description}" in run.out and run.metrics[1]["grad_norm"] > 0


RUNNABLE = {
    Feature.PACKING: [],
    Feature.CHECKPOINTING: ["--gradient_checkpointing"],
    Feature.PADDED_CHECKPOINTING: ["--gradient_checkpointing", "--packing", "False"],
    Feature.EIGHT_BITS: ["--load_in_8bit"],
    Feature.FOUR_BITS: ["--load_in_4bit"],
}


@pytest.mark.parametrize("feature", RUNNABLE)
@pytest.mark.parametrize("name", METHODS)
def test_the_table_of_capabilities_is_true(name, feature, train):
    """Where it says yes the run trains, with a gradient; where it says no the run is refused with the reason."""
    run = train("run", *method_flags(name), *no_dropout(name), *SHORT, *RUNNABLE[feature])
    obstacle = METHODS[name].obstacles.get(feature)
    if obstacle:
        assert run.code == 2 and obstacle in run.err
    else:
        assert run.code == 0, run.err
        assert run.metrics[1]["grad_norm"] > 0 and run.summary["final_eval_loss"] < run.summary["initial_eval_loss"]
        assert f"{METHODS[name].title}: 1 process on cpu, base in " in run.out
        assert ("forward pass: padded" in run.out) == (feature == Feature.PADDED_CHECKPOINTING)


def settings_of(*words: str) -> Any:
    """Settings from flags, on the bundled model."""
    flags, origins = parse(["--model_name_or_path", str(TINY_MODEL), "--train_file", "t.jsonl", *words])
    return before_data(flags, origins, AutoConfig.from_pretrained(TINY_MODEL))


@pytest.mark.parametrize("engine", [Feature.ZERO_3, Feature.FSDP])
@pytest.mark.parametrize("flags", [["--use_qlora"], ["--use_lora", "--load_in_4bit"], ["--load_in_8bit", "--use_ia3"]])
def test_quantised_weights_are_not_sharded(engine, flags):
    with pytest.raises(InputError, match="can't be sharded"):
        settings_of(*flags).check_engine(engine)
    settings_of(*flags).check_engine(Feature.ZERO_2)
    settings_of("--use_lora").check_engine(engine)


def test_ia3_is_refused_where_deepspeed_loses_it():
    with pytest.raises(InputError, match="loses track of IA3's factors"):
        settings_of("--use_ia3").check_engine(Feature.ZERO_3)


def test_the_documented_table_is_generated_from_the_code():
    assert (ROOT / "docs" / "capabilities.md").read_text() == make_capabilities.render()


def test_checkpointing_changes_no_step(train):
    flags = ["--use_prefix_tuning", *SHORT]
    plain, recomputed = train("plain", *flags), train("recomputed", *flags, "--gradient_checkpointing")
    for a, b in zip(without_measurements(plain.metrics), without_measurements(recomputed.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_compiled_layers_change_nothing_and_need_few_graphs(train):
    flags = ["--use_prompt_tuning", *SHORT]
    plain = train("plain", *flags)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train("compiled", *flags, "--compile")
    assert compiled.code == 0, compiled.err
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 12
    for a, b in zip(without_measurements(plain.metrics), without_measurements(compiled.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
