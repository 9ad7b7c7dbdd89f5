"""The command lines that use trained adapters, and training that continues one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

import open_instruct
from open_instruct import Sampling
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.finetune_peft import main as finetune
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from tests import warm
from tests.conftest import ADAPTERS, ROOT, TINY_MODEL, questions_of


def test_a_file_is_answered_by_each_adapter_and_votes(trained, questions_file, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    words = [
        "--adapter",
        f"a={trained / 'prompt_tuning'}",
        "--adapter",
        f"b={trained / 'lora'}",
        "--max_new_tokens",
        "16",
    ]
    files = ["--input_file", str(questions_file), "--output_file", str(out)]
    assert generate_main([*words, *files, "--combine", "vote", "--batch_size", "2"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(30))
    served = open_instruct.load(str(trained / "prompt_tuning"))
    assert [row["answers"]["a"] for row in rows[:8]] == served.answers(
        questions_of(questions_file), sampling=Sampling(16)
    )
    assert all(row["vote"] in (row["answers"]["a"][0], row["answers"]["b"][0]) and row["reference"] for row in rows)
    assert generate_main([*words, *files]) == 2
    assert "--resume" in capsys.readouterr().err
    assert generate_main([*words, *files, "--resume", "--combine", "concatenate"]) == 2
    assert "combine was 'vote' and is now 'concatenate'" in capsys.readouterr().err


def test_a_killed_file_goes_on_where_it_was(trained, questions_file, tmp_path):
    """A real kill in the middle; the resumed file equals one that was never interrupted."""
    lines = questions_file.read_text().splitlines() * 10
    many = tmp_path / "many.jsonl"
    many.write_text("\n".join(lines) + "\n")
    words = [
        "--adapter",
        str(trained / "prefix_tuning"),
        "--input_file",
        str(many),
        "--batch_size",
        "4",
        "--max_new_tokens",
        "8",
    ]
    complete, killed = tmp_path / "complete.jsonl", tmp_path / "killed.jsonl"
    assert generate_main([*words, "--output_file", str(complete)]) == 0
    process = warm.start(ROOT / "open_instruct" / "generate_peft.py", *words, "--output_file", str(killed))
    while process.poll() is None and not (killed.exists() and killed.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = killed.read_bytes().count(b"\n")
    assert 0 < done < 300
    with killed.open("ab") as file:
        file.write(b'{"number": 16, "mess')  # a kill can leave half a line
    assert generate_main([*words, "--output_file", str(killed), "--resume"]) == 0
    assert killed.read_bytes() == complete.read_bytes()


def test_a_chat_streams_switches_and_compares(trained):
    lines = "red green blue\n/use lora\nred green blue\n/reset\n/compare tall small\n/use nobody\n/what\n/quit\n"
    command = [sys.executable, str(ROOT / "open_instruct" / "generate_peft.py"), "--max_new_tokens", "12"]
    command += ["--adapter", str(trained / "prompt_tuning"), "--adapter", str(trained / "lora")]
    result = subprocess.run(
        command, input=lines, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    served = open_instruct.load([str(trained / "prompt_tuning"), str(trained / "lora")])
    names = ("base", "prompt_tuning", "lora")
    first, compared = (
        [served.answers([text], name, Sampling(12))[0][0] for name in names]
        for text in ("red green blue", "tall small")
    )
    assert f"prompt_tuning> {first[1]}" in result.stdout
    assert f"base: {compared[0]}\nprompt_tuning: {compared[1]}\nlora: {compared[2]}\n" in result.stdout
    assert "no adapter 'nobody': there are base, prompt_tuning, lora" in result.stdout
    assert result.stdout.count("/use NAME") == 2


@pytest.mark.parametrize("words, says", [
    (["--adapter", "missing/folder/x"], "no such adapter folder: missing/folder/x"),
    (["--adapter", "./missing"], "no such adapter folder: ./missing"),
    (["--adapter", str(TINY_MODEL)], "it holds a full model"),
    (["--adapter", "{lora}", "--adapter", "{lora}"], "two adapters are named 'lora'"),
    (["--adapter", "base={lora}"], "stands for the plain model"),
    (["--adapter", "{lora}", "--model_name_or_path", "{another}"], "was trained on"),
    (["--adapter", "{prompt_tuning}", "--model_name_or_path", "{another}", "--any_base"], "20 × 128 numbers for"),
    (["--adapter", "{pickled}"], "only as pickle (adapter_model.bin)"),
    (["--adapter", "{cut}"], "cut"),
    (["--adapter", "{empty}"], "has no adapter_model.safetensors"),
    (["--temperature", "0.5"], "need --do_sample"),
    (["--input_file", "x.jsonl"], "go together"),
    ([], "no base model is known"),
])  # fmt: skip
def test_wrong_input_is_one_line(words, says, trained, tmp_path, capsys):
    from tests.conftest import tiny_llama

    tiny_llama(vocab_size=1000).save_pretrained(tmp_path / "another")
    AutoTokenizer.from_pretrained(TINY_MODEL).save_pretrained(tmp_path / "another")
    for name in ("pickled", "cut", "empty"):
        shutil.copytree(trained / "lora", tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        (tmp_path / name / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(
        (trained / "lora" / "adapter_model.safetensors").read_bytes()[:5000]
    )
    folders = {name: tmp_path / name for name in ("another", "pickled", "cut", "empty")} | {
        m: trained / m for m in ADAPTERS
    }
    try:
        code = generate_main([word.format(**folders) for word in words])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize("method", [*ADAPTERS, "projected"])
def test_training_goes_on_from_an_adapter(method, trained, tmp_path, capsys):
    """The start is where the other run ended, to the last digits; the loss continues to fall."""
    common = [
        "--train_file",
        str(trained / "train.jsonl"),
        "--max_train_steps",
        "20",
        "--validation_fraction",
        "0.1",
        "--num_sample_answers",
        "0",
    ]
    common += ["--dataset_skip_cache", "--eval_steps", "0", "--learning_rate", "1e-3"]
    first = trained / method
    if method == "projected":
        first = tmp_path / "first"
        AcceleratorState._reset_state(reset_partial_state=True)
        model = [
            "--model_name_or_path",
            str(TINY_MODEL),
            "--use_prefix_tuning",
            "--prefix_projection",
            "--encoder_hidden_size",
            "48",
        ]
        model += ["--num_virtual_tokens", "20"]
        assert finetune([*common, *model, "--output_dir", str(first)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert finetune([*common, "--adapter_name_or_path", str(first), "--output_dir", str(tmp_path / "on")]) == 0
    before, after = [json.loads((folder / "summary.json").read_text()) for folder in (first, tmp_path / "on")]
    assert after["initial_eval_loss"] == pytest.approx(before["final_eval_loss"], rel=1e-6)
    assert (
        after["final_eval_loss"] < after["initial_eval_loss"]
        and after["trainable_parameters"] == before["trainable_parameters"]
    )


def test_going_on_is_refused_where_it_would_not_be_the_same(trained, tmp_path, capsys):
    common = ["--train_file", str(trained / "train.jsonl"), "--output_dir", str(tmp_path / "on")]
    foreign = tmp_path / "foreign"
    shutil.copytree(trained / "p_tuning", foreign)
    (foreign / "trained.safetensors").unlink()
    for words, says in [
        (
            ["--adapter_name_or_path", str(trained / "lora"), "--use_prompt_tuning"],
            "is LoRA, and the method is prompt_tuning",
        ),
        (
            ["--adapter_name_or_path", str(trained / "prompt_tuning"), "--use_lora"],
            "is prompt tuning, and the method is lora",
        ),
        (
            ["--adapter_name_or_path", str(trained / "ia3"), "--use_prefix_tuning"],
            "is IA3, and the method is prefix_tuning",
        ),
        (
            ["--adapter_name_or_path", str(trained / "prompt_tuning"), "--num_virtual_tokens", "7"],
            "contradicts the 20 of",
        ),
        (["--adapter_name_or_path", str(foreign)], "does not hold its network"),
        (["--adapter_name_or_path", str(TINY_MODEL)], "it holds a full model"),
    ]:
        assert finetune([*common, *words]) == 2
        assert says in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    small = [
        "--max_train_steps",
        "1",
        "--num_sample_answers",
        "0",
        "--validation_fraction",
        "0.1",
        "--dataset_skip_cache",
    ]
    assert (
        finetune([*common, *small, "--adapter_name_or_path", str(foreign), "--use_prompt_tuning"]) == 0
    )  # its vectors, as prompt tuning
    summaries = [
        json.loads((folder / "summary.json").read_text()) for folder in (trained / "p_tuning", tmp_path / "on")
    ]
    assert summaries[1]["initial_eval_loss"] == pytest.approx(summaries[0]["final_eval_loss"], rel=1e-6)


def test_the_adapter_that_is_gone_on_from_is_never_overwritten(trained, tmp_path, capsys):
    words = [
        "--train_file",
        str(trained / "train.jsonl"),
        "--adapter_name_or_path",
        str(trained / "lora"),
        "--overwrite_output_dir",
    ]
    assert finetune([*words, "--output_dir", str(trained / "lora")]) == 2
    assert (
        "is also the folder of the adapter" in capsys.readouterr().err
        and (trained / "lora" / "adapter_model.safetensors").exists()
    )
    assert finetune([*words, "--output_dir", str(tmp_path / "on"), "--lora_rank", "3"]) == 2
    assert "--lora_rank 3 contradicts the 64 of" in capsys.readouterr().err


@pytest.mark.parametrize("tool, words, says", [
    ("evaluate", ["--file", "{questions}", "--answer_regex", "#### (.*)"], "does not match the answer"),
    ("evaluate", ["--file", "{blank}"], "holds no row"),
    ("evaluate", ["--file", "{questions}", "--output_dir", "{questions}"], "can't be made"),
    ("evaluate", ["--file", "{questions}", "--seed", "-1"], "at least 0"),
    ("evaluate", ["--file", "{questions}", "--answer_regex", "("], "give a regular expression of Python"),
    ("evaluate", ["--file", "{questions}", "--chat_template_name", "{strict}"], "assistant can't be used"),
    ("generate", ["--repetition_penalty", "0", "--top_p", "2"], "0 is not a number from 0.01 to 100"),
    ("generate", ["--combine", "vote"], "belong to --input_file"),
    ("inspect", ["--output_dir", "{questions}"], "can't be made"),
])  # fmt: skip
def test_wrong_input_of_the_tools_is_one_line(tool, words, says, trained, questions_file, tmp_path, capsys):
    (tmp_path / "blank.jsonl").write_text("\n")
    # The sample conversation with which a template is tried has shorter messages.
    strict = "{% if messages[0]['content']|length > 8 %}{{ raise_exception('too long') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(strict + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    files = {"questions": questions_file, "blank": tmp_path / "blank.jsonl", "strict": tmp_path / "strict.jinja"}
    main = {"evaluate": evaluate_main, "generate": generate_main, "inspect": inspect_main}[tool]
    try:
        code = main(["--adapter", str(trained / "prompt_tuning"), *(word.format(**files) for word in words)])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and "Traceback" not in error, error


def test_an_output_that_other_settings_made_is_not_gone_on_with(trained, questions_file, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    words = [
        "--adapter",
        str(trained / "lora"),
        "--input_file",
        str(questions_file),
        "--output_file",
        str(out),
        "--max_new_tokens",
        "4",
    ]
    assert generate_main(words) == 0
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:1]))
    assert generate_main([*words, "--resume", "--chat_template_name", "zephyr"]) == 2
    assert "chat_template_name was None and is now 'zephyr'" in capsys.readouterr().err
    second = tmp_path / "second.jsonl"
    assert generate_main([*words[:1], str(tmp_path / "missing"), *words[2:4], "--output_file", str(second)]) == 2
    assert (
        generate_main([*words[:4], "--output_file", str(second), "--max_new_tokens", "4"]) == 0
    )  # a failed start blocks nothing
