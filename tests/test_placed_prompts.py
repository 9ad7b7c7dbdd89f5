"""Soft prompts of encoder–decoders where PEFT puts none: right, saved, refused by plain PEFT, used by every tool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForSeq2SeqLM
from transformers.masking_utils import eager_mask

from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from open_instruct.merge_peft import main as merge_main
from open_instruct.methods import placement
from open_instruct.model.encoder_decoder import decoder_start_of
from open_instruct.model.pair_attention import kinds_of
from open_instruct.model.placed_prompts import flat, prefix_width, stack_sizes, unflat
from tests.conftest import ROOT, TINY_T5
from tests.test_encoder_decoder import ARCHITECTURES, PADDED_ONLY, VOCAB, random_model, wrap

SAMPLE = ROOT / "data" / "sample"
HELD_OUT = SAMPLE / "heldout.jsonl"
EVERYWHERE = "encoder decoder cross"


def plain_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
    """Softmax over prefix and own keys, written out in float64; the prefix has no bias and is always visible."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (part.double().repeat_interleave(groups, 1) for part in (key, value))
    scores = query.double() @ keys.transpose(2, 3) * (others.get("scaling") or 1.0)
    prefix = getattr(module, "prefix_of_test", None)
    if prefix is not None:
        before = [part.double().repeat_interleave(groups, 1).expand(len(key), -1, -1, -1) for part in prefix]
        extra = query.double() @ before[0].transpose(2, 3) * (others.get("scaling") or 1.0)
    cap = others.get("softcap")
    cut = (lambda x: x) if cap is None else (lambda x: cap * torch.tanh(x / cap))
    scores = cut(scores)
    for bias in (attention_mask, others.get("position_bias")):
        scores = scores if bias is None else scores + bias[..., : key.shape[2]].double()
    if prefix is not None:
        scores, values = torch.cat([cut(extra), scores], 3), torch.cat([before[1], values], 2)
    return (scores.softmax(-1) @ values).to(value).transpose(1, 2), None


AttentionInterface.register("plain_of_test", plain_attention)
AttentionMaskInterface.register("plain_of_test", eager_mask)


def padded_batch() -> dict[str, torch.Tensor]:
    """Two sources, one padded, and what a decoder reads."""
    torch.manual_seed(5)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    ids = torch.randint(3, VOCAB, (2, 12)) * mask
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, VOCAB, (2, 9))}


@torch.no_grad()
def plain_logits(model: Any, prefixes: dict[str, Any]) -> torch.Tensor:
    """Return a base's logits with prefixes, by `plain_attention`."""
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    kinds: Any = kinds_of(base)
    for place, pairs in prefixes.items():
        for module, pair in zip([module for module, kind in kinds.items() if kind == place], pairs, strict=True):
            module.prefix_of_test = pair
    base.set_attn_implementation("plain_of_test")
    logits: torch.Tensor = base(**padded_batch(), use_cache=False).logits
    for module in kinds:
        module.__dict__.pop("prefix_of_test", None)
    base.set_attn_implementation("eager")
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefixes_equal_plain_attention(architecture):
    """Everywhere at once; each prefix taken away changes the logits, so each is seen."""
    model, _ = wrap(f"prefix_tuning at {EVERYWHERE}", random_model(architecture))
    with torch.no_grad():
        found = model(**padded_batch(), use_cache=False).logits
    prefixes = model.prefixes()
    assert set(prefixes) == set(EVERYWHERE.split())
    expected = plain_logits(model, prefixes)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for place in prefixes:
        rest = {name: pairs for name, pairs in prefixes.items() if name != place}
        assert not torch.allclose(found, plain_logits(model, rest), rtol=1e-2, atol=1e-2)
    assert torch.equal(model.get_base_model()(**padded_batch(), use_cache=False).logits, plain_base(model))


@torch.no_grad()
def plain_base(model: Any) -> torch.Tensor:
    with model.disable_adapter():
        logits: torch.Tensor = model(**padded_batch(), use_cache=False).logits
    return logits


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *PADDED_ONLY])
def test_decoder_prompts_are_tokens_before_the_answer(architecture):
    """As the base computes them from embeddings; and greedy answers with a cache are those without one."""
    model, _ = wrap("prompt_tuning at decoder", random_model(architecture))
    base, batch = model.get_base_model(), padded_batch()
    prompt = model.get_prompt(batch_size=2)
    embedded = base.get_decoder().get_input_embeddings()(batch["decoder_input_ids"])
    rest = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits
        expected = base(**rest, decoder_inputs_embeds=torch.cat([prompt, embedded], 1), use_cache=False).logits
    assert torch.allclose(found, expected[:, prompt.shape[1] :], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, base(**batch, use_cache=False).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("places", ["decoder", EVERYWHERE])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("architecture", ["umt5", "tied t5, wide heads", "bart", "t5gemma"])
def test_answers_with_a_cache_are_the_forward_passs(architecture, num_beams, places):
    """A cached answer's log-probability equals that of one forward pass over it, for greedy and beam search."""
    name = "prompt_tuning" if places == "decoder" else "prefix_tuning"
    model, _ = wrap(f"{name} at {places}", random_model(architecture))
    model.generation_config.forced_eos_token_id = None  # BART ends by force
    batch = {key: value for key, value in padded_batch().items() if key != "decoder_input_ids"}
    out = model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, num_beams=num_beams, do_sample=False, output_scores=True,
        return_dict_in_generate=True, renormalize_logits=True, length_penalty=0.0,
    )  # fmt: skip
    ids = out.sequences
    assert int(ids[0, 0]) == decoder_start_of(model.config) and ids.shape == (2, 7)
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=ids[:, :-1], use_cache=False).logits
    logits[:, :, model.generation_config.eos_token_id] = -torch.inf  # as `min_new_tokens` does
    losses = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    if num_beams > 1:
        assert torch.allclose(out.sequences_scores, losses, atol=1e-3)
    else:
        assert torch.equal(logits.argmax(-1), ids[:, 1:])


def test_the_layout_is_by_place_layer_and_kind():
    """Both ways, on stacks of different depth; what is swapped does not return."""
    base = random_model("gated t5")
    sizes = [stack_sizes(base, place) for place in EVERYWHERE.split()]
    assert sizes == [(2, 4, 8), (3, 4, 8), (3, 4, 8)] and prefix_width(base, EVERYWHERE.split()) == 8 * 64
    values = torch.randn(5, 8 * 64)
    places = unflat(values, sizes)
    assert [pair[0].shape for pairs in places for pair in pairs] == [(1, 4, 5, 8)] * 8
    assert torch.equal(flat([pair for pairs in places for pair in pairs]), values)
    assert torch.equal(places[1][2][1][0, 3, 4], values[4, (2 + 2) * 64 + 32 + 24 : (2 + 2) * 64 + 64])
    assert not torch.equal(flat([(value, key) for pairs in places for key, value in pairs]), values)


RUNS = {
    "prefix": ("--use_prefix_tuning", "--soft_prompt_at", "cross", "encoder"),
    "everywhere": ("--use_prefix_tuning", "--soft_prompt_at", *EVERYWHERE.split()),
    "prompt": ("--use_prompt_tuning", "--soft_prompt_at", "decoder"),
    "network": ("--use_p_tuning", "--soft_prompt_at", "decoder"),
}


@pytest.fixture(scope="module")
def placed(tmp_path_factory) -> dict[str, Path]:
    """A run of each kind on the bundled sample, with nothing set but place and length."""
    from open_instruct.finetune_peft import main as finetune

    folder = tmp_path_factory.mktemp("placed")
    for name, flags in RUNS.items():
        words = ["--model_name_or_path", str(TINY_T5), "--train_file", str(SAMPLE / "train.jsonl"), *flags]
        words += [
            "--validation_file",
            str(HELD_OUT),
            "--max_train_steps",
            "60",
            "--num_sample_answers",
            "0",
            "--output_dir",
            str(folder / name),
        ]
        assert finetune([*words, "--dataset_local_cache_dir", str(folder / "cache")]) == 0
    return {name: folder / name for name in RUNS}


def test_each_learns_with_nothing_set_and_every_tool_reads_it(placed, tmp_path):
    """Below the base; the tools' loss is training's own, and answers come."""
    words = [word for name, folder in placed.items() for word in ("--adapter", f"{name}={folder}")]
    words += ["--file", str(HELD_OUT), "--metrics", "loss", "--output_dir", str(tmp_path / "figures")]
    assert evaluate_main(words) == 0
    figures = json.loads((tmp_path / "figures" / "evaluation.json").read_text())["figures"]
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"prompt": "reverse the words: lion cat"}) + "\n")
    for name, folder in placed.items():
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["final_eval_loss"] < summary["base_eval_loss"], name
        assert figures[name]["loss"]["value"] == pytest.approx(summary["final_eval_loss"], rel=1e-4)
        answers = tmp_path / f"{name}.jsonl"
        words = ["--adapter", str(folder), "--input_file", str(questions), "--output_file", str(answers)]
        assert generate_main([*words, "--max_new_tokens", "8"]) == 0
        assert json.loads(answers.read_text())["answers"]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] in placement.PEFT_TYPES and config["soft_prompt_at"]


def test_plain_peft_refuses_them(placed):
    for folder in placed.values():
        with pytest.raises((KeyError, ValueError), match=r"PLACED_PREFIX_TUNING|DECODER_P"):
            PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(TINY_T5), str(folder))


def test_training_goes_on(placed, train, tmp_path):
    """From checkpoints bit for bit, and from the adapter; flags that contradict it are refused."""
    flags = (*RUNS["everywhere"], "--max_train_steps", "8", "--checkpointing_steps", "4", "--gradient_checkpointing")
    whole = train("whole", *flags, model=TINY_T5)
    assert whole.code == 0 and "packed pairs" in whole.out, whole.err
    shutil.copytree(whole.folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step_8")
    (tmp_path / "half" / "summary.json").unlink()
    assert train("half", *flags, "--resume_from_checkpoint", model=TINY_T5).code == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("everywhere", "prompt", "network"):
        words = ("--adapter_name_or_path", str(placed[name]), "--max_train_steps", "2")
        more = train(f"more-{name}", *words, "--validation_file", str(HELD_OUT), model=TINY_T5)
        assert more.code == 0, more.err
        config = json.loads((more.folder / "adapter_config.json").read_text())
        assert (
            config["soft_prompt_at"] == json.loads((placed[name] / "adapter_config.json").read_text())["soft_prompt_at"]
        )
        summary = json.loads((placed[name] / "summary.json").read_text())
        assert more.summary["initial_eval_loss"] == pytest.approx(summary["final_eval_loss"], rel=1e-4)
    words = ("--adapter_name_or_path", str(placed["prefix"]), "--soft_prompt_at", "encoder")
    wrong = train("wrong", *words, model=TINY_T5)
    assert wrong.code == 2 and "contradicts" in wrong.err


def test_padded_training_is_the_packed_ones(train):
    """The same losses to rounding, by the plain forward pass of the model."""
    losses = []
    for packing in ("True", "False"):
        run = train(f"run{packing}", *RUNS["everywhere"], "--max_train_steps", "4", "--packing", packing, model=TINY_T5)
        assert run.code == 0, run.err
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_they_are_inspected_and_not_merged(placed, tmp_path, capsys):
    for name in ("prefix", "prompt"):
        assert inspect_main(["--adapter", str(placed[name]), "--output_dir", str(tmp_path / name)]) == 0
    result = json.loads((tmp_path / "prefix" / "inspection.json").read_text())
    assert result["prefix_layers"][0] == "encoder 0" and len(result["prefix_norms"]["keys"]) == 6
    assert json.loads((tmp_path / "prompt" / "inspection.json").read_text())["end"]
    file = ["--file", str(HELD_OUT), "--output_dir", str(tmp_path / "c")]
    for command, words, reason in (
        (inspect_main, ["--adapter", str(placed["prompt"]), *file], "remove --file"),
        (merge_main, ["--adapter", str(placed["prefix"]), "--output", str(tmp_path / "m")], "encoder and cross, which"),
    ):
        capsys.readouterr()
        assert command(words) == 2
        error = capsys.readouterr().err
        assert reason in error and "Traceback" not in error


@pytest.mark.parametrize(
    "flags, model, expected",
    [
        (("--use_prompt_tuning", "--soft_prompt_at", "cross"), TINY_T5, "give encoder or decoder"),
        (("--use_prompt_tuning", "--soft_prompt_at", "encoder", "decoder"), TINY_T5, "give encoder or decoder"),
        (("--use_prefix_tuning", "--soft_prompt_at", "cross", "cross"), TINY_T5, "name each once"),
        (("--use_lora", "--soft_prompt_at", "encoder"), TINY_T5, "has no meaning for lora"),
        (("--use_prefix_tuning", "--soft_prompt_at", "encoder"), None, "is for encoder–decoders"),
    ],
)
def test_places_that_are_none_are_refused(flags, model, expected, train, tmp_path):
    run = train("run", *flags, **({"model": model} if model else {}))
    assert run.code == 2 and expected in run.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "places",
    [None, [], "encoder", ["middle"], [1], [["encoder"]], {"encoder": 1}, ["cross", "encoder"], ["cross", "cross"]],
)
def test_a_damaged_place_is_said(places, placed, tmp_path, capsys):
    folder = shutil.copytree(placed["prefix"], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "soft_prompt_at": places}))
    assert inspect_main(["--adapter", str(folder), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "soft_prompt_at is" in error and "Traceback" not in error
