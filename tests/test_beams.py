"""Beam search equals transformers' own, question by question; one question is answered by a command."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import open_instruct
from open_instruct import Sampling
from open_instruct.adapters.generation import generate
from open_instruct.errors import InputError
from open_instruct.generate_peft import main
from tests.conftest import ADAPTERS, ROOT, questions_of
from tests.test_generation import adapted


@torch.no_grad()
@pytest.mark.parametrize("method", ADAPTERS)
def test_beams_are_those_of_transformers(method):
    model, tokenizer, prompts = adapted(method)
    found = dict(generate(model, tokenizer, prompts, Sampling(10, num_beams=3), batch_size=6))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, num_beams=3, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        expected.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip())
    assert [found[index] for index in range(len(prompts))] == [[answer] for answer in expected]
    greedy = dict(generate(model, tokenizer, prompts, Sampling(10)))
    if method in ("prompt_tuning", "prefix_tuning"):  # whose answers are unsure enough
        assert [greedy[index] for index in range(len(prompts))] != [[answer] for answer in expected]  # control


def test_one_question_is_answered_and_nothing_else_printed(trained, questions_file, tmp_path):
    """By a process of its own: whatever libraries print would stand on its standard output."""
    adapter, question = str(trained / "prompt_tuning"), questions_of(questions_file)[0]
    served = open_instruct.load(adapter)
    ((expected,),) = served.answers([question], sampling=Sampling(16))
    words = [sys.executable, str(ROOT / "open_instruct" / "generate_peft.py"), "--adapter", adapter]
    words += ["--max_new_tokens", "16", "--prompt", question]
    run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, f"{expected}\n"), run.stderr
    assert expected and list(tmp_path.iterdir()) == []


def test_prompt_takes_system_context_and_beams(trained, questions_file, tmp_path, capsys):
    adapter, question = str(trained / "prompt_tuning"), questions_of(questions_file)[0]
    words = ["--adapter", adapter, "--max_new_tokens", "16", "--prompt", question]

    def answer(*more: str) -> str:
        capsys.readouterr()
        assert main([*words, *more]) == 0
        return capsys.readouterr().out

    served = open_instruct.load(adapter)
    system = [{"role": "system", "content": "old wolf"}, {"role": "user", "content": question}]
    assert answer("--system", "old wolf") == served.answers([system], sampling=Sampling(16))[0][0] + "\n"
    assert answer("--num_beams", "4") == served.answers([question], sampling=Sampling(16, num_beams=4))[0][0] + "\n"
    (tmp_path / "context.txt").write_text("narrow dry old open " * 3)
    assert answer("--context", str(tmp_path / "context.txt")) != answer()
    assert main([*words[:-1], "long " * 3000]) == 2
    assert "shorten it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        (["--num_beams", "2", "--do_sample", "--prompt", "x"], "--num_beams 2 follows the likeliest tokens"),
        (["--num_beams", "2"], "a chat prints an answer as it comes"),
        (["--num_beams", "2", "--prompt", "x", "--engine", "vllm"], "vLLM has no such search"),
        (["--num_beams", "0", "--prompt", "x"], "0 is not a whole number of at least 1"),
        (["--prompt", "x", "--input_file", "f", "--output_file", "o"], "--prompt answers one question"),
        (["--prompt", "x", "--output_file", "o"], "--prompt answers one question"),
        (["--prompt", "x", "--resume"], "--prompt prints one answer"),
        (["--prompt", "x", "--adapter", "a", "--adapter", "b"], "--prompt prints one answer"),
        (["--prompt", "x", "--conversations"], "--conversations has no effect with --prompt"),
        (["--prompt", " "], "--prompt is empty"),
    ],
)
def test_contradictions_are_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--model_name_or_path", "m", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error


def test_beams_and_draws_exclude_each_other_in_python():
    with pytest.raises(InputError, match="num_beams 2 follows"):
        Sampling(num_beams=2, do_sample=True)
