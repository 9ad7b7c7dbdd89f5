"""--dry_run of a base whose weights are not here: the same plan as with them, and what is unknown without them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from accelerate.state import AcceleratorState

from open_instruct.finetune_peft import main
from open_instruct.model.without_weights import has_weights
from tests.conftest import METHODS, ROOT, TINY_MODEL, TINY_T5, method_flags, write_conversations


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> dict[Path, Path]:
    """The bundled models, without their weights."""
    folder, no_weights = tmp_path_factory.mktemp("bare"), shutil.ignore_patterns("*.safetensors")
    for model in (TINY_MODEL, TINY_T5):
        shutil.copytree(model, folder / model.name, ignore=no_weights)
    return {model: folder / model.name for model in (TINY_MODEL, TINY_T5)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("rows") / "train.jsonl", "reverse", 40)


def plan_of(capsys: pytest.CaptureFixture, model: Path, rows: Path, *flags: str) -> list[str]:
    """What a dry run prints, a line each."""
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    words = ["--model_name_or_path", str(model), "--train_file", str(rows), "--dataset_skip_cache", *flags]
    code = main([*words, "--output_dir", str(rows.parent / "never"), "--dry_run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out.splitlines()


def differences(found: list[str], expected: list[str]) -> tuple[set[str], set[str]]:
    """The names of hyperparameters that are unknown, and the other lines in which plans differ."""
    assert "has no weights here" in found[-2] and found[-1].startswith("  unknown ")
    probed = [line for line in expected if line.startswith(("quantised base:", "gradient at the embeddings:"))]
    assert bool(probed) == ("quantised base" in found[-1])
    expected = [line for line in expected if line not in probed]
    pairs = list(zip(found[:-2], expected, strict=True))
    unknown = {new.split()[0] for new, _ in pairs if " unknown " in new}
    return unknown, {new for new, old in pairs if new != old and " unknown " not in new}


@pytest.mark.parametrize("model", [TINY_MODEL, TINY_T5], ids=["causal", "encoder-decoder"])
def test_the_plan_is_the_one_with_weights_but_for_what_they_decide(model, bare, rows, capsys):
    """Of each method; the recipes of prompt and prefix tuning measure the base."""
    for method in METHODS:
        flags = method_flags(method)
        found, expected = (plan_of(capsys, folder, rows, *flags) for folder in (bare[model], model))
        unknown, others = differences(found, expected)
        assert unknown == ({"learning_rate"} if method in ("prompt_tuning", "prefix_tuning") else set()), method
        assert not others, method
        assert ("learning_rate" in found[-1]) == bool(unknown)
    changed = plan_of(capsys, bare[TINY_MODEL], rows, *method_flags("lora"), "--lora_rank", "2")
    with pytest.raises((AssertionError, ValueError)):  # another plan is noticed
        assert not differences(changed, expected)[1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_qlora", "--dtype", "bfloat16"],
        ["--use_lora", "--load_in_8bit", "--dtype", "bfloat16"],
        ["--use_lora", "--init_lora_weights", "pissa"],
        ["--use_prompt_tuning", "--learning_rate", "0.1"],
        ["--use_prompt_tuning", "--learning_rate_factor", "3"],
        ["--use_prefix_tuning", "--prefix_projection"],
        ["--use_lora", "--packing", "False", "--gradient_checkpointing"],
        ["--use_prompt_tuning", "--distill_context", str(ROOT / "LICENSE"), "--max_seq_length", "64"],
    ],
    ids=lambda flags: " ".join(Path(word).name for word in flags),
)
def test_flags_that_change_the_base_or_the_forward_pass_count(flags, bare, rows, capsys):
    if "--distill_context" in flags:
        context = rows.with_name("context.txt")
        context.write_text("The words stand in reverse. " * 5)
        flags = [str(context) if word.endswith("LICENSE") else word for word in flags]
    found, expected = (plan_of(capsys, folder, rows, *flags) for folder in (bare[TINY_MODEL], TINY_MODEL))
    unknown, others = differences(found, expected)
    assert not others
    is_measured = "--use_prompt_tuning" in flags and "--learning_rate" not in flags
    assert unknown == ({"learning_rate"} if is_measured else set())


def test_a_model_larger_than_this_machine_is_counted(bare, rows, tmp_path, capsys):
    """Llama 3 70B has 70,553,706,496 parameters; the index without its files is what a download of *.json leaves."""
    folder = tmp_path / "large"
    shutil.copytree(bare[TINY_MODEL], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00030.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = plan_of(capsys, folder, rows, "--use_prompt_tuning", "--num_virtual_tokens", "10", "--dtype", "bfloat16")
    assert "trained parameters   81,920 of 70,553,788,416" in "\n".join(lines)
    assert "(weights 141,10" in "\n".join(lines)  # two bytes each


def test_training_without_weights_and_plans_that_need_them_are_refused(bare, rows, tmp_path, capsys):
    stored = tmp_path / "stored"
    shutil.copytree(bare[TINY_MODEL], stored)
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (stored / "config.json").write_text(json.dumps(config))
    part = tmp_path / "part"
    shutil.copytree(bare[TINY_MODEL], part)
    shutil.copy(TINY_MODEL / "model.safetensors", part / "model-00001-of-00002.safetensors")
    names = {letter: f"model-0000{number}-of-00002.safetensors" for letter, number in (("a", 1), ("b", 2))}
    index = {"metadata": {}, "weight_map": names}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder, more, reason in (
        (bare[TINY_MODEL], [], "holds no weights"),
        (stored, ["--dry_run"], "counts such models only with their weights"),
        (part, ["--dry_run"], "model-00002-of-00002.safetensors"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ["--model_name_or_path", str(folder), "--train_file", str(rows), "--output_dir", str(tmp_path / "out")]
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert reason in error and "Traceback" not in error


def test_a_name_in_the_hubs_cache_needs_no_weights(rows, tmp_path, monkeypatch):
    """The cache as huggingface_hub lays it out, with all but the weights."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(TINY_MODEL, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--model_name_or_path", "someone/tiny", "--train_file", str(rows), "--use_prompt_tuning", "--dry_run"]
    command = [sys.executable, str(ROOT / "open_instruct" / "finetune_peft.py"), *words, "--dataset_skip_cache"]
    variables = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "someone/tiny has no weights here" in done.stdout and "memory per process" in done.stdout
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert not has_weights("someone/tiny") and not has_weights("someone/other")
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(TINY_MODEL / "model.safetensors", snapshot / shards[0])
    assert not has_weights("someone/tiny")  # a download that ended early
    shutil.copy(TINY_MODEL / "model.safetensors", snapshot / shards[1])
    assert has_weights("someone/tiny") and not has_weights("someone/tiny", "another-branch")
