"""--hard_prompt: shared once a row, it is what the same text before each example is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import open_instruct
from open_instruct import study_peft
from open_instruct.adapters.harness import check_hard_prompts
from open_instruct.data import packing
from open_instruct.errors import InputError
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.generate_peft import main as generate_main
from open_instruct.merge_peft import main as merge_main
from open_instruct.model import attention_blocked, attention_varlen, shared_prefix
from open_instruct.model.backends import BACKENDS
from open_instruct.model.training_model import PackedModel, PaddedModel
from tests.conftest import TINY_MODEL, method_flags, no_dropout, write_conversations
from tests.test_backends import reference_kernel
from tests.tiny_models import (
    VARIANTS,
    examples,
    gradient_error,
    packed_token_losses,
    padded_token_losses,
    random_model,
    step,
    wrap,
)

HARD = tuple(range(20, 33))  # longer than the sliding window of the tiny models


def hard_differences(
    architecture: str, variant: str, backend: str = "blocked", hard: tuple[int, ...] = HARD, checkpointing: bool = False
) -> float:
    """The largest relative difference of loss, losses of tokens and gradient: the text shared, and before each row."""
    base = random_model(architecture)
    model, method = wrap(variant, base)
    rows = examples()
    behind = [packing.behind_context({**row, "context": HARD}, 0) for row in rows]
    expected_loss, expected = step(PaddedModel(model), packing.Padding(8, 0, HARD).collate(rows))
    expected_tokens = padded_token_losses(model, behind)
    packed = PackedModel(model, partial(method.soft_prompt, model), BACKENDS[backend], "find", hard)
    packed.activate()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = step(packed, packing.pack(rows))
    tokens = packed_token_losses(packed, rows)
    assert expected.norm() > 1e-3 and len(tokens) == len(expected_tokens)
    return max(
        ((tokens - expected_tokens).abs() / expected_tokens.abs().clamp(min=1)).max().item(),
        abs(loss - expected_loss) / expected_loss,
        gradient_error(gradient, expected),
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shared_text_is_the_text_before_each_example(architecture, variant):
    assert hard_differences(architecture, variant) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
def test_with_other_attention_and_with_checkpointing(variant, monkeypatch):
    monkeypatch.setitem(BACKENDS, "varlen", partial(attention_varlen.varlen, reference_kernel))
    assert hard_differences("mistral", variant, "varlen") < 1e-5
    assert hard_differences("llama", variant, "sdpa") < 1e-5
    assert hard_differences("mistral", variant, "sdpa") < 1e-5
    assert hard_differences("llama", variant, checkpointing=True) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_text_is_noticed(variant):
    """The negative control: one token of it is another one."""
    assert hard_differences("llama", variant, hard=(*HARD[:-1], 99)) > 1e-3


@pytest.mark.parametrize("variant", ["prefix_tuning", "projected prefix"])
def test_a_hard_prompt_that_does_not_see_the_prefix_is_noticed(variant, monkeypatch):
    """Else its keys would be those of the base, and their part of the gradient would be missing."""
    spans = shared_prefix.Segments.spans
    monkeypatch.setattr(
        shared_prefix.Segments, "spans", lambda self: [(s, e, 0 if s == 0 else n) for s, e, n in spans(self)]
    )
    attention_blocked._groups.cache_clear()
    try:
        assert hard_differences("llama", variant) > 1e-3
    finally:
        attention_blocked._groups.cache_clear()


@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
def test_the_base_is_computed_behind_the_same_text(variant):
    base = random_model("llama")
    behind = [packing.behind_context({**row, "context": HARD}, 0) for row in examples()]
    expected = padded_token_losses(base, behind)
    model, method = wrap(variant, base)
    with PackedModel(model, partial(method.soft_prompt, model), BACKENDS["blocked"], "find", HARD) as packed:
        with packed.without_adapter():
            tokens = packed_token_losses(packed, examples())
        adapted = packed_token_losses(packed, examples())
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert (adapted - expected).abs().max() > 1e-2


def test_the_text_is_embedded_once_a_row():
    """However many examples it has; repeated, as the padded path does, it would be embedded with each."""
    base = random_model("llama")
    model, method = wrap("prompt_tuning", base)
    seen = []
    hook = base.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with PackedModel(model, partial(method.soft_prompt, model), BACKENDS["blocked"], "find", HARD) as packed:
        seen.clear()
        packed(**packing.pack(examples()))
    hook.remove()
    assert [tuple(ids.shape) for ids in seen] == [(1, len(HARD) + sum(len(row["input_ids"]) for row in examples()))]


TEXT = "Put the words in order. For example, red green blue becomes blue green red."
TURNS = [
    {"role": "system", "content": "Put the words in order."},
    {"role": "user", "content": "red green blue"},
    {"role": "assistant", "content": "blue green red"},
]
SHORT = ["--max_train_steps", "4", "--eval_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    """A text, messages, training and held-out rows."""
    folder = tmp_path_factory.mktemp("hard")
    (folder / "text.txt").write_text(TEXT)
    (folder / "turns.json").write_text(json.dumps(TURNS))
    return SimpleNamespace(
        folder=folder,
        text=folder / "text.txt",
        turns=folder / "turns.json",
        train=write_conversations(folder / "train.jsonl", "reverse", 24, long_every=4),
        held_out=write_conversations(folder / "heldout.jsonl", "reverse", 6, seed=3, long_every=4),
    )


def written_out(before: list[dict[str, str]], row: list[dict[str, str]], end: str, bos: str) -> list[tuple[str, bool]]:
    """Turns and a conversation in pieces, as the template of tulu writes them, by hand; is each of them learned?"""
    pieces = [(bos, False)]
    for number, message in enumerate([*before, *row]):
        is_answer = message["role"] == "assistant"
        pieces.append((f"<|{message['role']}|>\n", False))
        pieces.append((message["content"] + (end if is_answer else ""), is_answer and number >= len(before)))
        pieces.append(("\n", False))
    return pieces[:-1]


@torch.no_grad()
def plain_loss(model: Any, held_out: Path, before: list[dict[str, str]], bos: str = "") -> float:
    """Loss of the answers behind messages, single rows, sharing no code with a run but the model and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    total = count = 0
    for line in held_out.read_text().splitlines():
        pieces = written_out(before, json.loads(line)["messages"], tokenizer.eos_token, bos)
        learned = [is_learned for text, is_learned in pieces for _ in text]
        encoded = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :].double()
        losses = -logits.log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        inside = torch.tensor([all(learned[a:b]) for a, b in encoded["offset_mapping"]][1:])
        total += losses[inside].sum().item()
        count += int(inside.sum())
    return total / count


@pytest.mark.parametrize(
    "method, given",
    [("prompt_tuning", "text"), ("prefix_tuning", "turns"), ("lora", "turns"), ("full", "text")],
)
def test_a_run_packed_padded_and_by_hand(method, given, train, files):
    before = TURNS if given == "turns" else [{"role": "system", "content": TEXT}]
    virtual = ["--num_virtual_tokens", "6"] if method not in ("lora", "full") else []
    flags = [*method_flags(method), *no_dropout(method), *virtual, *SHORT, "--validation_file", str(files.held_out)]
    flags += ["--hard_prompt", str(getattr(files, given))]
    packed = train("packed", *flags, data=files.train)
    padded = train("padded", *flags, "--packing", "False", data=files.train)
    assert packed.code == padded.code == 0, packed.err + padded.err
    assert "hard prompt: " in packed.out and "forward pass: packed" in packed.out
    for one, other in zip(packed.metrics, padded.metrics, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-4 if name == "grad_norm" else 1e-5)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert plain_loss(base, files.held_out, before) == pytest.approx(packed.summary["base_eval_loss"], rel=1e-5)
    assert plain_loss(base, files.held_out, []) != pytest.approx(packed.summary["base_eval_loss"], rel=1e-3)
    if method == "full":
        return
    tuned = PeftModel.from_pretrained(base, packed.folder).eval()
    assert plain_loss(tuned, files.held_out, before) == pytest.approx(packed.summary["final_eval_loss"], rel=1e-5)
    assert plain_loss(tuned, files.held_out, []) != pytest.approx(packed.summary["final_eval_loss"], rel=1e-3)


def test_a_token_at_the_beginning_stands_there_once(train, files):
    """The text has the beginning-of-sequence token, and the rows lose theirs; labels of all tokens stay equal."""
    flags = ["--use_prompt_tuning", "--num_virtual_tokens", "4", *SHORT, "--add_bos", "--hard_prompt", str(files.text)]
    flags += ["--validation_file", str(files.held_out)]
    bos = AutoTokenizer.from_pretrained(TINY_MODEL).bos_token
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    for labels in ("answers", "all"):
        packed = train(f"packed-{labels}", *flags, "--labels", labels, data=files.train)
        padded = train(f"padded-{labels}", *flags, "--labels", labels, "--packing", "False", data=files.train)
        assert packed.code == padded.code == 0, packed.err + padded.err
        assert packed.summary["final_eval_loss"] == pytest.approx(padded.summary["final_eval_loss"], rel=1e-5)
        if labels == "answers":
            expected = plain_loss(base, files.held_out, [{"role": "system", "content": TEXT}], bos)
            assert packed.summary["base_eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_tools_use_it_again(train, files, capsys, tmp_path):
    """From run.json, although the file is gone; an adapter without one is asked without."""
    text = tmp_path / "moved.txt"
    text.write_text(TEXT)
    flags = ["--use_prompt_tuning", "--num_virtual_tokens", "6", *SHORT, "--validation_file", str(files.held_out)]
    run = train("behind", *flags, "--hard_prompt", str(text), "--num_sample_answers", "2", data=files.train)
    plain = train("plain", *flags, data=files.train)
    text.unlink()
    recorded = json.loads((run.folder / "run.json").read_text())["hard_prompt"]
    assert recorded["content"] == TEXT and recorded["tokens"] > 10

    served = open_instruct.load(str(run.folder))
    held_out = [json.loads(row)["messages"] for row in files.held_out.read_text().splitlines()]
    for sample in run.summary["samples"]:
        assert "Put the words" not in sample["question"]
        (asked,) = [row[:-1] for row in held_out if row[-2]["content"] in sample["question"]]
        instructed = [{"role": "system", "content": TEXT}, *asked]
        ((tuned,),), ((base,),) = served.answers([asked], "behind"), served.answers([instructed], "base")
        assert tuned.startswith(sample["tuned"]) and base.startswith(sample["base"])

    out = tmp_path / "evaluated"
    words = ["--adapter", str(run.folder), "--file", str(files.held_out), "--metrics", "loss"]
    assert evaluate_main([*words, "--output_dir", str(out)]) == 0
    line = f"behind: its hard prompt of {recorded['tokens']} tokens (run.json) stands before each question"
    assert line in capsys.readouterr().err
    result = json.loads((out / "evaluation.json").read_text())
    assert result["hard_prompt_tokens"] == dict.fromkeys(("base", "behind"), recorded["tokens"])
    rows = [json.loads(row)["messages"] for row in files.held_out.read_text().splitlines()]
    assert any(len(row) > 2 for row in rows)  # of these, training labels each answer, and an evaluation the last
    single = tmp_path / "single.jsonl"
    single.write_text("".join(json.dumps({"messages": row[:2]}) + "\n" for row in rows))
    before = [{"role": "system", "content": TEXT}]
    words = ["--file", str(single), "--metrics", "loss", "--adapter", str(run.folder)]
    assert evaluate_main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())["figures"]
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert one["base"]["loss"]["value"] == pytest.approx(plain_loss(base, single, before), rel=1e-5)
    tuned = PeftModel.from_pretrained(base, run.folder).eval()
    assert one["behind"]["loss"]["value"] == pytest.approx(plain_loss(tuned, single, before), rel=1e-5)
    assert evaluate_main([*words, "--adapter", str(plain.folder), "--output_dir", str(tmp_path / "two")]) == 0
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    assert list(two["hard_prompt_tokens"]) == ["behind"]  # they differ, so the base is measured without any
    assert two["figures"]["behind"] == one["behind"]
    bare = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert two["figures"]["base"]["loss"]["value"] == pytest.approx(plain_loss(bare, single, []), rel=1e-5)

    capsys.readouterr()
    assert generate_main(["--adapter", str(run.folder), "--prompt", "red dry old", "--max_new_tokens", "12"]) == 0
    printed = capsys.readouterr()
    assert line in printed.err and line not in printed.out
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    pieces = written_out(before, [{"role": "user", "content": "red dry old"}], tokenizer.eos_token, "")
    question = "".join(text for text, _ in pieces) + "\n<|assistant|>\n"
    ids = torch.tensor([tokenizer(question, add_special_tokens=False)["input_ids"]])
    answer = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(answer[0], skip_special_tokens=True).removeprefix(
        tokenizer.decode(ids[0], skip_special_tokens=True)
    )
    assert printed.out.strip() == expected.strip()


def test_what_can_not_be_is_refused_in_one_line(train, files, tmp_path, capsys):
    flags = ["--use_prompt_tuning", "--num_virtual_tokens", "4", *SHORT]
    run = train("behind", *flags, "--hard_prompt", str(files.text), data=files.train)
    adapter = str(run.folder)
    capsys.readouterr()
    assert merge_main(["--adapter", adapter, "--output", str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert "was trained behind a hard prompt, which a merged checkpoint does not hold" in error
    assert error.count("\n") == 1 and not (tmp_path / "merged").exists()
    with pytest.raises(InputError, match="stands before no question of the harness"):
        check_hard_prompts(open_instruct.load(adapter))
    (tmp_path / "long.txt").write_text("word " * 5000)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "user.json").write_text(json.dumps(TURNS[:2]))
    (tmp_path / "object.json").write_text("{}")
    for extra, says in [
        (["--hard_prompt", str(tmp_path / "none.txt")], "none.txt"),
        (["--hard_prompt", str(tmp_path / "long.txt")], "shorten the text, or lower --max_seq_length"),
        (["--hard_prompt", str(tmp_path / "empty.txt")], "is empty"),
        (["--hard_prompt", str(tmp_path / "user.json")], "ends with a turn of the user"),
        (["--hard_prompt", str(tmp_path / "object.json")], "must be a JSON array of {role, content} objects"),
        (
            ["--hard_prompt", str(files.text), "--distill_context", str(files.text)],
            "--distill_context stands before the",
        ),
        (["--adapter_name_or_path", adapter], "was trained behind a hard prompt, which its run.json holds"),
        (
            ["--hard_prompt", str(files.text), "--max_tokens_per_microbatch", "60"],
            "and 4 virtual ones and the hard prompt's ",
        ),
    ]:
        name = "".join(char for char in says if char.isalnum())[:20]
        chosen = SHORT if "--adapter_name_or_path" in extra else flags
        refused = train(name, *chosen, *extra, data=files.train)
        assert refused.code == 2 and says in refused.err and refused.err.count("\n") == 1, (extra, refused.err)
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(record | {"hard_prompt": {"content": [1]}}))
    with pytest.raises(InputError, match=r"run\.json: hard_prompt must be a JSON array"):
        open_instruct.load(adapter)


def test_a_study_measures_base_and_trials_behind_the_text(files, tmp_path):
    """Held-out losses of both equal those by hand; a base without the text would be another."""
    flags = {"model_name_or_path": TINY_MODEL, "train_file": [files.train], "validation_file": files.held_out}
    flags |= {
        "hard_prompt": files.turns,
        "max_seq_length": 200,
        "max_train_steps": 1,
        "dataset_local_cache_dir": tmp_path / "cache",
    }
    study = {"flags": flags, "methods": ["lora"], "report": {"questions": 1}, "output_dir": tmp_path / "study"}
    (tmp_path / "study.yaml").write_text(json.dumps(study, default=str))
    assert study_peft.main(["--config", str(tmp_path / "study.yaml")]) == 0
    folder, *_ = (tmp_path / "study" / "trials").iterdir()
    (base_file,) = (tmp_path / "study").glob("base-*.json")
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    expected = plain_loss(base, files.held_out, TURNS)
    assert expected != pytest.approx(plain_loss(base, files.held_out, []), rel=1e-2)
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    for path, loss in ((base_file, expected), (folder / "summary.json", plain_loss(adapted, files.held_out, TURNS))):
        sums = torch.tensor(json.loads(path.read_text())["study"]["rows"]).double().sum(0)
        assert (sums[0] / sums[1]).item() == pytest.approx(loss, rel=1e-5), path.name


def test_an_adapter_is_continued_behind_the_same_text(train, files):
    flags = [*SHORT, "--hard_prompt", str(files.text), "--validation_file", str(files.held_out)]
    first = train("first", "--use_prompt_tuning", "--num_virtual_tokens", "4", *flags, data=files.train)
    second = train("second", "--adapter_name_or_path", str(first.folder), *flags, data=files.train)
    assert second.code == 0, second.err
    assert second.summary["initial_eval_loss"] == pytest.approx(first.summary["final_eval_loss"], rel=1e-5)
    assert second.summary["base_eval_loss"] == pytest.approx(first.summary["base_eval_loss"], rel=1e-6)
