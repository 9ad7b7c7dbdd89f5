"""New tokens: added to the tokenizer, trained beside LoRA, saved so that plain PEFT gives the same loss, merged."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.generate_peft import main as generate_main
from open_instruct.merge_peft import main as merge_main
from open_instruct.model.new_tokens import add_new_tokens, grow_vocabulary, sources_of, trained_rows
from tests.conftest import TINY_MODEL, tiny_llama

TOKENS = ["<rev>", "<end>=stop near"]
SHORT = ["--use_lora", "--max_train_steps", "4", "--per_device_train_batch_size", "4", "--eval_steps", "0"]
SHORT += ["--keep_best", "False", "--lora_rank", "4", "--chat_template_name", "tulu"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Conversations in which the new tokens stand, for training and held out."""
    folder = tmp_path_factory.mktemp("rows")
    words = ["old", "dry", "open", "near", "narrow", "low", "high", "small", "sharp", "rich", "snow", "fox"]
    for name, count in (("train", 30), ("heldout", 8)):
        lines = []
        for number in range(count):
            chosen = [words[(number + 5 * step) % len(words)] for step in range(3)]
            question, answer = f"<rev> {' '.join(chosen)}", f"{' '.join(chosen[::-1])} <end>"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def loss_of(model, tokenizer, path) -> float:
    """Held-out loss by a plain loop over single examples, with transformers' own chat template."""
    total = count = 0
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        start = len(tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        labelled = torch.tensor([first >= start for first, _ in encoded["offset_mapping"]])
        with torch.no_grad():
            losses = -model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        picked = losses[torch.arange(len(losses)), ids[0, 1:]][labelled[1:]]
        total, count = total + picked.sum().item(), count + len(picked)
    return total / count


@pytest.fixture
def run(rows, train):
    return train(
        "run", *SHORT, "--new_tokens", *TOKENS, "--validation_file", str(rows / "heldout.jsonl"),
        "--checkpointing_steps", "2", data=rows / "train.jsonl",
    )  # fmt: skip


def test_plain_peft_gives_the_loss_with_the_saved_tokenizer(run, rows, train):
    assert run.code == 0, run.err
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert len(tokenizer("<rev><end>", add_special_tokens=False)["input_ids"]) == 2
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    base.resize_token_embeddings(len(tokenizer))  # to random rows, which the adapter replaces
    tuned = PeftModel.from_pretrained(base, run.folder).eval()
    assert loss_of(tuned, tokenizer, rows / "heldout.jsonl") == pytest.approx(run.summary["final_eval_loss"], rel=1e-5)
    control = AutoTokenizer.from_pretrained(TINY_MODEL)  # without the tokens another text is read
    control.chat_template = tokenizer.chat_template
    assert loss_of(tuned, control, rows / "heldout.jsonl") != pytest.approx(run.summary["final_eval_loss"], rel=1e-2)
    # The rows are trained, and a resumed run is the same run.
    delta = next(value for name, value in tuned.named_parameters() if "trainable_tokens_delta" in name)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    grow_vocabulary(model, sources_of(tokenizer, TOKENS))
    start = model.get_input_embeddings().weight[-2:]
    assert delta.shape == start.shape and (delta - start).abs().min() > 0 and (delta - start).abs().max() < 0.1
    words = ["--validation_file", str(rows / "heldout.jsonl"), "--resume_from_checkpoint"]
    checkpoint = str(run.folder / "checkpoints" / "step_2")
    again = train("again", *SHORT, "--new_tokens", *TOKENS, *words, checkpoint, data=rows / "train.jsonl")
    weights = [(item.folder / "adapter_model.safetensors").read_bytes() for item in (run, again)]
    assert weights[0] == weights[1], again.err
    other = train("other", *SHORT, "--new_tokens", "<rev>", *words, checkpoint, data=rows / "train.jsonl")
    assert other.code == 2 and "belongs to another run" in other.err


def test_our_tools_use_and_merge_them(run, rows, tmp_path, capsys):
    words = ["--adapter", f"a={run.folder}"]
    held_out = rows / "heldout.jsonl"
    measured = ["--file", str(held_out), "--metrics", "loss", "--output_dir", str(tmp_path / "e")]
    assert evaluate_main([*words, *measured]) == 0
    figures = json.loads((tmp_path / "e" / "evaluation.json").read_text())["figures"]
    assert figures["a"]["loss"]["value"] == pytest.approx(run.summary["final_eval_loss"], rel=1e-4)
    assert figures["base"]["loss"]["value"] == pytest.approx(run.summary["base_eval_loss"], rel=1e-4)
    assert generate_main([*words, "--prompt", "<rev> old dry", "--max_new_tokens", "4"]) == 0
    assert merge_main([*words, "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings and merged.config.vocab_size == len(tokenizer)
    tokenizer.chat_template = AutoTokenizer.from_pretrained(run.folder).chat_template
    assert loss_of(merged, tokenizer, held_out) == pytest.approx(run.summary["final_eval_loss"], rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_as_means_in_both_matrices(tied):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    num_rows = len(tokenizer)
    model = tiny_llama(vocab_size=num_rows, tie_word_embeddings=tied)
    before = [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.lm_head)]
    pieces = tokenizer("stop near", add_special_tokens=False)["input_ids"]
    add_new_tokens(tokenizer, TOKENS)
    sources = sources_of(tokenizer, TOKENS)
    assert sources == {num_rows: [], num_rows + 1: pieces} and len(pieces) > 1
    grow_vocabulary(model, sources)
    for layer, old in zip((model.get_input_embeddings(), model.lm_head), before, strict=True):
        assert torch.equal(layer.weight[:num_rows], old) and len(layer.weight) == num_rows + 2
        torch.testing.assert_close(layer.weight[num_rows].detach(), old.mean(0))
        torch.testing.assert_close(layer.weight[num_rows + 1].detach(), old[pieces].mean(0))
    assert len(trained_rows(model, list(sources))) == (1 if tied else 2)


def test_spare_rows_are_used_first():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    model = tiny_llama(vocab_size=len(tokenizer) + 8)
    add_new_tokens(tokenizer, TOKENS)
    grow_vocabulary(model, sources_of(tokenizer, TOKENS))
    assert len(model.get_input_embeddings().weight) == len(tokenizer) + 6


@pytest.mark.parametrize(
    "words, says",
    [
        (["a", "a"], "the token a stands there twice"),
        (["<a>="], "is neither TOKEN nor TOKEN=TEXT"),
        (["near"], "it is in the vocabulary already"),
        (["<a>", "--modules_to_save", "lm_head"], "--modules_to_save lm_head changes their rows too"),
        (["<a>", "--lora_target_modules", "embed_tokens", "q_proj"], "--lora_target_modules embed_tokens changes"),
        (["<a>", "--adapter_name_or_path", "x"], "a trained adapter has the tokens that it has"),
    ],
)
def test_tokens_that_cannot_be_added_are_one_line(words, says, train):
    refused = train("refused", *SHORT, "--new_tokens", *words)
    assert refused.code == 2 and says in refused.err and refused.err.count("\n") == 1, refused.err


def test_adapters_with_other_tokens_are_not_mixed_or_continued(run, rows, train, capsys):
    plain = train("plain", *SHORT, "--validation_file", str(rows / "heldout.jsonl"), data=rows / "train.jsonl")
    capsys.readouterr()
    words = ["--adapter", str(run.folder), "--adapter", str(plain.folder), "--file", str(rows / "heldout.jsonl")]
    assert evaluate_main([*words, "--metrics", "loss"]) == 2
    assert "adapters run and plain were trained with different new tokens" in capsys.readouterr().err
    on = train("on", "--adapter_name_or_path", str(run.folder), "--max_train_steps", "1")
    assert on.code == 2 and "has new tokens, which can't be trained on" in on.err
