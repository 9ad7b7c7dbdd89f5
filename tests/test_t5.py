"""The bundled T5: every method learns, resumes, answers, is merged and served; what can't be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ctranslate2
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from open_instruct.adapters.prompt_tokens import NewTokens, grow_encoder
from open_instruct.adapters.scoring import answer_losses
from open_instruct.data import chat
from open_instruct.data.pairs import tokenize_pairs
from open_instruct.evaluate_peft import main as evaluate
from open_instruct.finetune_peft import main as finetune
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from open_instruct.merge_peft import main as merge
from open_instruct.model.encoder_decoder import decoder_start_of
from tests.conftest import ROOT, TINY_MODEL, TINY_T5
from tests.test_encoder_decoder import random_model, token_losses, wrap

SAMPLE = ROOT / "data" / "sample"
METHODS = ("full", "lora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning")
QUESTIONS = ["fox bear horse", "Sort the words. wolf duck fig", "hot near"]


@pytest.fixture(scope="module")
def trained_pairs(tmp_path_factory) -> dict[str, Path]:
    """A run of every method on the bundled sample, with nothing set but its length."""
    folder = tmp_path_factory.mktemp("pairs")
    for method in METHODS:
        words = ["--model_name_or_path", str(TINY_T5), "--train_file", str(SAMPLE / "train.jsonl")]
        words += [f"--use_{method}"] if method != "full" else []
        words += ["--max_train_steps", "60", "--num_sample_answers", "0", "--output_dir", str(folder / method)]
        assert finetune([*words, "--dataset_local_cache_dir", str(folder / "cache")]) == 0
    return {method: folder / method for method in METHODS}


def words_of(folder: Path) -> AutoTokenizer:
    """Return a folder's tokenizer, as training uses it."""
    words = AutoTokenizer.from_pretrained(folder)
    chat.mark_pairs(words)
    chat.set_chat_template(words, chat.PLAIN)
    return words


def test_every_method_learns_with_nothing_set(trained_pairs):
    """The held-out loss falls below the base's; the saved adapter gives the same loss in plain PEFT."""
    rows = [json.loads(line) for line in (SAMPLE / "heldout.jsonl").read_text().splitlines()[:8]]
    ids, spans = tokenize_pairs(words_of(TINY_T5), [row["messages"] for row in rows], 999)
    for method, folder in trained_pairs.items():
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["final_eval_loss"] < 0.8 * summary["base_eval_loss"], method
        if method == "full":
            plain = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        else:
            plain = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), folder).eval()
        found = answer_losses(plain, ids, spans, 4)
        alone = [
            token_losses(plain, {"input_ids": row, "spans": list(span[-1])}).sum().item()
            for row, span in zip(ids, spans, strict=True)
        ]
        assert [loss for loss, _ in found] == pytest.approx(alone, rel=1e-4)
        assert sum(alone) / sum(number for _, number in found) < summary["base_eval_loss"]


def test_a_full_model_stands_beside_adapters_and_the_base(trained_pairs, tmp_path, capsys):
    """One table on the same rows; each figure is that of the model measured alone."""
    rows = ["--file", str(SAMPLE / "heldout.jsonl"), "--max_samples", "12", "--metrics", "loss", "exact_match"]
    full, lora = trained_pairs["full"], trained_pairs["lora"]
    together = ["--adapter", f"lora={lora}", "--model", f"full={full}", "--output_dir", str(tmp_path / "both")]
    assert evaluate([*together, *rows]) == 0
    alone = ["--model_name_or_path", str(full), "--output_dir", str(tmp_path / "alone")]
    assert evaluate([*alone, *rows]) == 0
    both, one = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("both", "alone"))
    assert list(both["figures"]) == ["base", "lora", "full"] and both["models"] == {"full": str(full)}
    assert both["figures"]["full"] == one["figures"]["base"]
    assert both["differences_from_base"]["full"]["loss"]["value"] < 0
    (tmp_path / "hard").mkdir()
    (tmp_path / "hard" / "run.json").write_text(json.dumps({"hard_prompt": {"content": "a text", "tokens": 2}}))
    capsys.readouterr()
    for word, reason in (
        (f"lora={full}", "another model is named 'lora'"),
        (str(full), "give NAME=DIR"),
        (f"hard={tmp_path / 'hard'}", "trained behind a hard prompt"),
        (f"full={tmp_path / 'nowhere'}", "no such folder"),
        (f"words={ROOT / 'assets' / 'lookup-model'}", "can't be compared"),
    ):
        assert evaluate(["--adapter", f"lora={lora}", "--model", word, *rows]) == 2
        error = capsys.readouterr().err
        assert reason in error and "Traceback" not in error


def test_every_mergeable_adapter_answers_alike_in_plain_transformers(trained_pairs, tmp_path):
    """Logits, greedy and beam answers of the checkpoint, whose tokenizer writes the soft prompt by itself."""
    for method, adapter in trained_pairs.items():
        if method in ("full", "prefix_tuning"):
            continue
        merged = tmp_path / method
        assert merge(["--adapter", str(adapter), "--output", str(merged)]) == 0
        base = AutoModelForSeq2SeqLM.from_pretrained(TINY_T5).eval()
        adapted = PeftModel.from_pretrained(base, adapter).eval()
        plain = AutoModelForSeq2SeqLM.from_pretrained(merged).eval()
        before, after = AutoTokenizer.from_pretrained(TINY_T5), AutoTokenizer.from_pretrained(merged)
        record = json.loads((merged / "merged.json").read_text())
        assert record["largest_difference"] < 1e-4
        for question in QUESTIONS:
            for beams in (1, 3):
                answers = [
                    words.decode(
                        model.generate(
                            **words(question, return_tensors="pt"), max_new_tokens=24, num_beams=beams, do_sample=False
                        )[0],
                        skip_special_tokens=True,
                    )
                    for words, model in ((before, adapted), (after, plain))
                ]
                assert answers[0] == answers[1]
        talk = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "horse bear fox"}]
        ((own,), (own_spans,)), ((ids,), (spans,)) = (
            tokenize_pairs(words_of(path), [talk], 999) for path in (TINY_T5, merged)
        )
        number = len(ids) - len(own)  # virtual tokens, before the source only
        assert ids[number:] == own and spans == [(own_spans[0][0] + number, own_spans[0][1] + number)]


def test_a_merged_prompt_answers_alike_in_ctranslate2(trained_pairs, tmp_path):
    merged = tmp_path / "merged"
    assert merge(["--adapter", str(trained_pairs["prompt_tuning"]), "--output", str(merged)]) == 0
    ctranslate2.converters.TransformersConverter(str(merged)).convert(str(tmp_path / "engine"))
    translator = ctranslate2.Translator(str(tmp_path / "engine"), device="cpu", compute_type="float32")
    tokenizer, plain = AutoTokenizer.from_pretrained(merged), AutoModelForSeq2SeqLM.from_pretrained(merged).eval()
    for question in QUESTIONS:
        ids = tokenizer(question)["input_ids"]
        wanted = plain.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0]
        result = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(ids)], beam_size=1, max_decoding_length=24
        )[0]
        found = tokenizer.convert_tokens_to_ids(result.hypotheses[0])
        assert tokenizer.decode(found) == tokenizer.decode(wanted, skip_special_tokens=True)
        assert found


@pytest.mark.parametrize("architecture", ["gated t5", "tied t5, wide heads", "umt5", "bart", "mbart", "t5gemma"])
def test_prompts_grow_into_every_family(architecture, tmp_path):
    """Random models of each family: the checkpoint's logits are those of base + prompt, and new tokens get none."""
    model, method = wrap("prompt_tuning", random_model(architecture))
    source, start = torch.tensor([[5, 9, 7]]), decoder_start_of(model.config)
    read = torch.tensor([[start, 11, 12]])
    with torch.no_grad():
        expected = model(input_ids=source, decoder_input_ids=read, use_cache=False).logits
        base, vectors = model.get_base_model(), method.prompt_vectors(model)
        old = base.get_input_embeddings().weight.shape[0]
        new = NewTokens("a", tuple("abcde"), tuple(range(old, old + 5)))
        base.generation_config = GenerationConfig()
        grow_encoder(base, (new, vectors))
        base.save_pretrained(tmp_path)
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
        longer = torch.cat([torch.tensor([new.ids]), source], 1)
        found = plain(input_ids=longer, decoder_input_ids=read, use_cache=False).logits
        without = plain(input_ids=source, decoder_input_ids=read, use_cache=False).logits
    torch.testing.assert_close(found[..., :old], expected, rtol=1e-4, atol=1e-4)
    assert (without[..., :old] - expected).abs().max() > 1e-2
    assert found[..., old:].max() <= 0


@pytest.mark.parametrize("architecture", ["tied t5, wide heads", "umt5", "bart", "t5gemma"])
def test_every_family_is_trained_used_and_merged(architecture, train, tmp_path):
    """Heads that are not as wide as D / H, few positions, and a configuration for each stack are no obstacle."""
    folder, words = tmp_path / "model", AutoTokenizer.from_pretrained(TINY_T5)
    random_model(architecture, len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    for method in ("prefix_tuning", "lora"):
        run = train(method, f"--use_{method}", "--max_train_steps", "1", model=folder)
        assert run.code == 0 and "packed pairs" in run.out, run.err
        rows = ["--file", str(SAMPLE / "heldout.jsonl"), "--max_samples", "2", "--metrics", "loss"]
        assert evaluate(["--adapter", str(run.folder), *rows]) == 0
    assert merge(["--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "merged")]) == 0


def test_a_row_longer_than_the_models_positions_is_refused(train, tmp_path):
    folder, words = tmp_path / "model", AutoTokenizer.from_pretrained(TINY_T5)
    random_model("bart", len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    run = train("run", "--use_lora", "--max_tokens_per_microbatch", "300", model=folder)
    assert run.code == 2 and "at most 256 positions" in run.err and "Traceback" not in run.err


def test_what_can_not_be_merged_says_so(trained_pairs, tmp_path, capsys):
    prompt, prefix = trained_pairs["prompt_tuning"], trained_pairs["prefix_tuning"]
    for words, reason in (
        (["--adapter", str(prefix)], "can't be merged"),
        (["--adapter", f"a={prompt}", "--adapter", f"b={prompt}"], "one soft prompt"),
    ):
        assert merge([*words, "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert reason in message and "Traceback" not in message
        assert not Path(tmp_path / "out").exists()


def test_a_run_resumes_bit_for_bit_and_answers(train, tmp_path):
    flags = ("--use_prefix_tuning", "--max_train_steps", "8", "--checkpointing_steps", "4", "--gradient_checkpointing")
    whole = train("whole", *flags, model=TINY_T5)
    assert whole.code == 0 and "packed pairs" in whole.out, whole.err
    shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_8")
    (tmp_path / "half" / "summary.json").unlink()
    resumed = train("half", *flags, "--resume_from_checkpoint", model=TINY_T5)
    assert resumed.code == 0, resumed.err
    first, second = (load_file(run.folder / "adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text(json.dumps({"prompt": "reverse the words: lion cat"}) + "\n")
    words = ["--adapter", str(whole.folder), "--input_file", str(questions), "--output_file", str(out)]
    assert generate_main([*words, "--max_new_tokens", "8"]) == 0
    assert json.loads(out.read_text())["answers"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--add_bos",), "--add_bos is for causal language models"),
        (("--use_lora", "--distill_system"), "--distill_system is for causal language models"),
        (("--use_lora", "--hard_prompt", "text.txt"), "--hard_prompt is for causal language models"),
        (("--attn_backend", "sdpa"), "--attn_backend is for causal language models"),
        (("--use_prefix_tuning", "--prefix_projection"), "--prefix_projection is for causal language models"),
    ],
)
def test_flags_of_causal_models_are_refused(flags, expected, train, tmp_path):
    run = train("run", *flags, model=TINY_T5)
    assert run.code == 2 and expected in run.err and not (tmp_path / "run").exists()


def test_a_soft_prompt_is_inspected(trained_pairs, tmp_path, capsys):
    """Neighbours and the encoder's attention of embeddings; norms of a prefix, whose attention is refused."""
    prompt, prefix = trained_pairs["prompt_tuning"], trained_pairs["prefix_tuning"]
    words = ["--file", str(SAMPLE / "heldout.jsonl"), "--rows", "3"]
    assert inspect_main(["--adapter", str(prompt), *words, "--output_dir", str(tmp_path / "a")]) == 0
    result = json.loads((tmp_path / "a" / "inspection.json").read_text())
    assert len(result["attention"]["mass"]) == 3 and all(0 < mass < 1 for mass in result["attention"]["mass"])
    assert inspect_main(["--adapter", str(prefix), "--output_dir", str(tmp_path / "b")]) == 0
    assert len(json.loads((tmp_path / "b" / "inspection.json").read_text())["prefix_norms"]["keys"]) == 3
    capsys.readouterr()
    assert inspect_main(["--adapter", str(prefix), *words, "--output_dir", str(tmp_path / "c")]) == 2
    assert "remove --file" in capsys.readouterr().err


def test_tools_that_can_not_use_them_say_so(train, tmp_path, capsys):
    """In one line, and nothing is written."""
    run = train("run", "--use_prompt_tuning", "--max_train_steps", "1", model=TINY_T5)
    text = tmp_path / "text.txt"
    text.write_text("lion cat")
    adapter, out = ["--adapter", str(run.folder)], str(tmp_path / "out")
    for command, words in (
        (generate_main, ["--context", str(text), "--self_study", "2", "--output_file", f"{out}.jsonl"]),
    ):
        capsys.readouterr()
        assert command([*adapter, *words]) == 2
        error = capsys.readouterr().err
        assert "causal language models" in error and "Traceback" not in error
    assert not Path(out).exists()


def test_adapters_of_the_other_kind_are_refused(train, tmp_path, capsys):
    """Both ways, and before anything is answered."""
    causal = train("causal", "--use_lora", "--max_train_steps", "1")
    pair = train("pair", "--use_lora", "--max_train_steps", "1", model=TINY_T5)
    assert (causal.code, pair.code) == (0, 0)
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"prompt": "lion cat"}) + "\n")
    for adapter, base in ((causal.folder, TINY_T5), (pair.folder, TINY_MODEL)):
        words = ["--adapter", str(adapter), "--model_name_or_path", str(base), "--any_base"]
        words += ["--input_file", str(questions), "--output_file", str(tmp_path / f"{Path(base).name}.jsonl")]
        assert generate_main(words) == 2
        assert "give the base that it was trained on" in capsys.readouterr().err
