"""Bad input, as a user meets it: exit code 2, one line that names value, reason and remedy, nothing written."""

import json
import shutil

import pytest
import torch

from tests import warm
from tests.conftest import ROOT, TINY_MODEL


def bad_model(tmp_path, change):
    """A copy of the tiny model, changed."""
    folder = tmp_path / "model"
    shutil.copytree(TINY_MODEL, folder)
    change(folder)
    return folder


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def silent_template(folder):
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message.role }}\n{% endfor %}")


def small_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


CASES = {
    "no such model": (["--model_name_or_path", "./nowhere"], "no such model folder: ./nowhere"),
    "not a model": (["--model_name_or_path", "."], "has no config.json"),
    "pickle": ((pickle_only, []), "only as pickle (pytorch_model.bin)"),
    "no weights": ((lambda folder: (folder / "model.safetensors").unlink(), []), "holds no weights"),
    "torn weights": ((lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), []), "can't be loaded"),
    "no template": ((without_template, ["--chat_template_name", "tokenizer"]), "has no chat template"),
    "template without answers": (
        (silent_template, ["--chat_template_name", "tokenizer"]),
        "chat template tokenizer writes no answer of the assistant",
    ),
    "no such file": (["--train_file", "missing.jsonl"], "no such file: missing.jsonl"),
    "validation is training": (["--validation_file", "{data}"], "is the training file"),
    "context": (
        ["--use_prompt_tuning", "--num_virtual_tokens", "1000", "--max_seq_length", "100"],
        "context of 1024 positions",
    ),
    "too many virtual tokens": (["--use_prompt_tuning", "--num_virtual_tokens", "2000"], "fills the model's context"),
    "too short": (["--max_seq_length", "3"], "none of the 80 conversations has a labelled token"),
    "checkpoint": (["--resume_from_checkpoint", "nowhere"], "checkpoint nowhere can't be used (it does not exist)"),
    "checkpointing": (
        ["--use_prefix_tuning", "--gradient_checkpointing", "--packing", "False"],
        "prefix tuning does not work with gradient checkpointing, padded",
    ),
    "row": (
        ["--use_prompt_tuning", "--max_tokens_per_microbatch", "30"],
        "--max_tokens_per_microbatch 30 can't hold the longest example",
    ),
    "back end": (["--attn_backend", "varlen"], "--attn_backend varlen can't be used: it needs a GPU"),
    "flash back end": (["--attn_backend", "flash_attn"], "--attn_backend flash_attn can't be used: it needs a GPU"),
    "packing flags": (
        ["--packing", "False", "--attn_backend", "sdpa"],
        "--attn_backend sdpa: it belongs to the packed forward pass",
    ),
    "quantised full": (["--load_in_4bit"], "full fine-tuning does not work with 4-bit base"),
    "two quantisations": (
        ["--use_lora", "--load_in_4bit", "--load_in_8bit"],
        "--load_in_4bit: it excludes --load_in_8bit",
    ),
    "float16 weights": (["--dtype", "float16"], "--dtype float16: full fine-tuning does not compute in float16"),
    "final rate": (
        ["--final_lr_ratio", "0.1", "--lr_scheduler_type", "polynomial"],
        "--final_lr_ratio 0.1: it works with",
    ),
    "tracker": (["--with_tracking", "--report_to", "notepad"], "--report_to notepad"),
    "output is the model": (
        ["--output_dir", str(TINY_MODEL), "--overwrite_output_dir"],
        "is also the folder of the base model",
    ),
    "output folder": (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere can't be written"),
    "flash": (["--use_flash_attn"], "needs a GPU"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_code_2(case, tmp_path, data_file, capsys):
    from open_instruct.finetune_peft import main

    flags, says = CASES[case]
    words = {
        "--model_name_or_path": str(TINY_MODEL),
        "--train_file": str(data_file),
        "--output_dir": str(tmp_path / "out"),
    }
    words["--dataset_local_cache_dir"] = str(tmp_path / "cache")
    if isinstance(flags, tuple):
        change, flags = flags
        words["--model_name_or_path"] = str(bad_model(tmp_path, change))
    flags = [str(data_file) if word == "{data}" else word for word in flags]
    if flags and flags[0] in words:
        words[flags[0]] = flags[1]
        flags = flags[2:]
    capsys.readouterr()
    code = main([word for pair in words.items() for word in pair] + flags)
    error = capsys.readouterr().err
    assert code == 2 and says in error, error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_does_not_fit_is_named(tmp_path, data_file, train):
    folder = bad_model(tmp_path, lambda folder: None)
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder)
    run = train("run", model=folder)
    assert run.code == 2 and "embeds only 50 tokens" in run.err


def test_pickled_weights_load_when_allowed(tmp_path, train):
    def change(folder):
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    folder = bad_model(tmp_path, change)
    run = train("run", "--use_prompt_tuning", "--allow_pickle", "--max_train_steps", "1", model=folder)
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    "words", [["--train_file", "x.jsonl"], ["--trainfile", "x"], ["--use_lora", "--use_ia3"], ["missing.yaml"]]
)
def test_the_process_ends_with_code_2_and_no_traceback(words, tmp_path):
    first = "--model_name_or_path" if words[0] != "missing.yaml" else "missing.yaml"
    entry = ROOT / "open_instruct" / "finetune_peft.py"
    result = warm.run(entry, first, str(TINY_MODEL), *words, cwd=tmp_path)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and len(result.stderr.strip().splitlines()) == 1
