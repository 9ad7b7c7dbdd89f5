"""A soft prompt and LoRA trained together: exact, resumed, saved as two adapters of plain PEFT, used and merged."""

import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from open_instruct.adapters.folders import parse_adapters
from open_instruct.adapters.vllm_engine import check_engine
from open_instruct.command_line import parse
from open_instruct.data import packing
from open_instruct.evaluate_peft import main as evaluate_main
from open_instruct.finetune_peft import main as finetune
from open_instruct.flags import check_flags
from open_instruct.generate_peft import main as generate_main
from open_instruct.inspect_peft import main as inspect_main
from open_instruct.merge_peft import main as merge_main
from open_instruct.methods import COMBINED
from open_instruct.model.training_model import PaddedModel, base_only
from open_instruct.study.config import method_spec
from open_instruct.study.search import make_trial
from open_instruct.training.base_model import Bases
from tests.conftest import TINY_MODEL, TINY_T5, write_conversations
from tests.test_finetune import plain_loss
from tests.tiny_models import (
    P,
    examples,
    gradient_error,
    packed_model,
    packed_token_losses,
    padded_token_losses,
    random_model,
    step,
    wrap,
)

PROMPTS = ["prompt_tuning", "prefix_tuning", "p_tuning"]
SHORT = ["--max_train_steps", "4", "--per_device_train_batch_size", "4", "--eval_steps", "0", "--keep_best", "False"]
SHORT += ["--lora_rank", "4", "--num_virtual_tokens", "6"]
STARTS = {"prompt_tuning": ["--prompt_tuning_init", "text"], "prefix_tuning": ["--prefix_init", "text"], "p_tuning": []}
ONE_STEP = ["--use_lora", "--max_train_steps", "1", "--eval_steps", "0"]
ONE_STEP_OF_BOTH = [*ONE_STEP, "--use_prompt_tuning", *STARTS["prompt_tuning"]]
PARTS = ["soft_prompt/adapter_model.safetensors", "lora/adapter_model.safetensors"]


def trained_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_token_losses(prompt, leaves, scale):
    """Losses of single examples by a plain model without PEFT: weights W + s B A, and vectors or keys put first.

    Args:
        prompt: the soft prompt's method.
        leaves: trained parameters by name.
        scale: s.
    """
    model = random_model("llama")
    weights = {}
    for name, a in leaves.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.").split(".lora_A.")[0]
            b = leaves[name.replace(".lora_A.", ".lora_B.")]
            weights[f"{layer}.weight"] = model.get_parameter(f"{layer}.weight").detach() + scale * b @ a
    vectors = leaves["prompt_encoder.default.embedding.weight"]
    if prompt == "p_tuning":
        for number in (0, 2, 4):
            linear = [leaves[f"prompt_encoder.default.mlp_head.{number}.{part}"] for part in ("weight", "bias")]
            vectors = F.linear(vectors.relu() if number else vectors, *linear)
    losses = []
    for row in examples():
        ids, embedded = torch.tensor([row["input_ids"]]), model.get_input_embeddings().weight
        if prompt == "prefix_tuning":
            cache, heads, size = DynamicCache(), 2, 8
            for layer, (keys, values) in enumerate(vectors.view(P, 3, 2, heads, size).permute(1, 2, 3, 0, 4)):
                cache.update(keys[None], values[None], layer)
            inputs = {"input_ids": ids, "past_key_values": cache}
        else:
            inputs = {"inputs_embeds": torch.cat([vectors, embedded[ids[0]]])[None], "use_cache": False}
        logits = functional_call(model, weights, kwargs=inputs).logits[0, -ids.shape[1] :]
        labels = torch.tensor(packing.labels_of(row["input_ids"], row["spans"]))[1:]
        chosen = labels != packing.IGNORE
        losses.append(F.cross_entropy(logits[:-1][chosen], labels[chosen], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_packed_and_padded_losses_and_gradients_are_those_of_a_plain_model(prompt):
    model, method = wrap(f"{prompt}_and_lora", random_model("llama"))
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in trained_of(model).items()}
    assert any("lora_B" in name for name in leaves) and any("prompt_encoder" in name for name in leaves)
    expected = plain_token_losses(prompt, leaves, 16 / 4)
    expected.sum().backward()
    gradient = torch.cat([leaf.grad.flatten() for leaf in leaves.values()])
    rows = examples()
    _, padded = step(PaddedModel(model), packing.pad(rows, 0))
    torch.testing.assert_close(padded_token_losses(model, rows), expected.detach(), rtol=1e-5, atol=1e-5)
    packed_row = packed_model(model, method)
    _, packed = step(packed_row, packing.pack(rows))
    torch.testing.assert_close(packed_token_losses(packed_row, rows), expected.detach(), rtol=1e-5, atol=1e-5)
    assert gradient_error(padded, gradient) < 1e-4 and gradient_error(packed, gradient) < 1e-4
    # Controls: without LoRA, and with another soft prompt, neither losses nor gradients are these.
    for scale, change in ((0.0, 0.0), (4.0, 0.05)):
        others = {name: leaf.detach() + change * ("prompt_encoder" in name) for name, leaf in leaves.items()}
        others = {name: value.requires_grad_() for name, value in others.items()}
        control = plain_token_losses(prompt, others, scale)
        control.sum().backward()
        assert (control - expected).abs().max() > 1e-2
        wrong = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in others.values()]
        assert gradient_error(torch.cat([leaf.flatten() for leaf in wrong]), gradient) > 1e-2


def load_with_plain_peft(folder):
    """Load both adapters one after the other, as docs/lora.md says."""
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    model = PeftModel.from_pretrained(base, folder / "lora")
    return PeftModel.from_pretrained(model.get_base_model(), folder / "soft_prompt").eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_run_resumes_bit_for_bit_and_plain_peft_and_our_tools_give_its_loss(prompt, train, tmp_path, capsys):
    held_out = write_conversations(tmp_path / "heldout.jsonl", "reverse", 10, seed=3, long_every=4)
    flags = ["--use_lora", f"--use_{prompt}", *STARTS[prompt], *SHORT, "--validation_file", str(held_out)]
    run = train("run", *flags, "--checkpointing_steps", "2")
    assert run.code == 0 and "packed, rows" in run.out, run.err
    again = train("again", *flags, "--resume_from_checkpoint", str(run.folder / "checkpoints" / "step_2"))
    for part in PARTS:
        assert (run.folder / part).read_bytes() == (again.folder / part).read_bytes(), again.err
    other = train("other", *flags, "--lora_learning_rate_ratio", "0.5", "--resume_from_checkpoint",
                  str(run.folder / "checkpoints" / "step_2"))  # fmt: skip
    assert other.code == 2 and "lora_learning_rate_ratio was None and is now 0.5" in other.err

    final = run.summary["final_eval_loss"]
    assert plain_loss(load_with_plain_peft(run.folder), held_out) == pytest.approx(final, rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert plain_loss(base, held_out) == pytest.approx(run.summary["base_eval_loss"], rel=1e-5)
    for part in ("soft_prompt", "lora"):  # the controls: both of them are needed
        alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), run.folder / part).eval()
        assert plain_loss(alone, held_out) != pytest.approx(final, rel=1e-2)

    words = ["--adapter", f"pair={run.folder}", "--adapter", f"lora={run.folder / 'lora'}"]
    measured = ["--file", str(held_out), "--metrics", "loss", "--output_dir", str(tmp_path / "e")]
    words += ["--chat_template_name", "tulu"]
    assert evaluate_main([*words, *measured]) == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "e" / "evaluation.json").read_text())["figures"]
    assert figures["pair"]["loss"]["value"] == pytest.approx(final, rel=1e-4)
    assert figures["base"]["loss"]["value"] == pytest.approx(run.summary["base_eval_loss"], rel=1e-4)
    assert figures["lora"]["loss"]["value"] != pytest.approx(final, rel=1e-2)

    assert merge_main(["--adapter", str(run.folder), "--output", str(tmp_path / "merged")]) == 0
    result = json.loads((tmp_path / "merged" / "merged.json").read_text())
    assert result["largest_difference"] < 1e-5 and result["tokens"]["run"]["number"] == 6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    pair = load_with_plain_peft(run.folder)
    layer = pair.get_base_model().model.layers[1].mlp.up_proj
    weight = layer.base_layer.weight + 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, weight, rtol=0, atol=1e-6)
    assert not torch.allclose(layer.base_layer.weight, weight, atol=1e-5)
    if prompt != "prefix_tuning":  # whose tokens stand for keys and values that only a server has
        ids, new = (AutoTokenizer.from_pretrained(path)("the red stone", return_tensors="pt")["input_ids"]
                    for path in (run.folder, tmp_path / "merged"))  # fmt: skip
        with torch.no_grad():
            wanted, got = pair(input_ids=ids).logits[0, 6:], merged(new).logits[0, 6:]
        torch.testing.assert_close(got[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)


def test_answers_inspection_and_the_padded_pass(train, tmp_path, capsys):
    """The padded pass takes the same steps; our answers are those of plain PEFT; the soft prompt can be looked at."""
    flags = ["--use_lora", "--use_prompt_tuning", *SHORT, "--lora_dropout", "0", "--checkpointing_steps", "2"]
    run = train("run", *flags)
    padded = train("padded", *flags, "--packing", "False")
    assert run.code == padded.code == 0 and "padded, 4 rows" in padded.out, padded.err
    losses = [[row["loss"] for row in item.metrics if "loss" in row] for item in (run, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 4
    assert run.summary["final_eval_loss"] == pytest.approx(padded.summary["final_eval_loss"], rel=1e-3)

    capsys.readouterr()
    question = "old dry open"
    assert generate_main(["--adapter", str(run.folder), "--prompt", question, "--max_new_tokens", "6"]) == 0
    answer = capsys.readouterr().out.strip()
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    messages = [{"role": "user", "content": question}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **options)
    tokens = load_with_plain_peft(run.folder).generate(**inputs, max_new_tokens=6, do_sample=False)
    length = inputs["input_ids"].shape[1]
    assert tokenizer.decode(tokens[0, -6:] if tokens.shape[1] <= 6 else tokens[0, length:], True).strip() == answer

    words = ["--adapter", str(run.folder), "--output_dir", str(tmp_path / "look"), "--file"]
    held_out = write_conversations(tmp_path / "heldout.jsonl", "reverse", 3, seed=3)
    assert inspect_main([*words, str(held_out), "--rows", "2"]) == 0
    result = json.loads((tmp_path / "look" / "inspection.json").read_text())
    assert result["method"] == "prompt tuning and LoRA" and [row["step"] for row in result["drift"]] == [2, 4]
    assert len(result["attention"]["mass"]) == 4 and min(result["moved"]) > 0


def test_two_rates_from_two_recipes_are_printed_and_scaled_by_one_factor(train):
    """The optimizer has every trained parameter once; LoRA+ multiplies LoRA's own rate."""
    rates = {}
    for factor in ("1", "0.5"):
        run = train("run", "--use_lora", "--use_prompt_tuning", "--learning_rate_factor", factor, "--dry_run")
        lines = re.findall(r"^  (learning_rate(?: of LoRA)?)  +(\S+)", run.out, re.MULTILINE)
        rates[factor] = {name: float(value) for name, value in lines}
    alone = [train("run", f"--use_{name}", "--dry_run").out for name in ("prompt_tuning", "lora")]
    recipes = [float(re.search(r"^  learning_rate  +(\S+)", text, re.MULTILINE)[1]) for text in alone]
    assert list(rates["1"].values()) == pytest.approx(recipes, rel=1e-3) and recipes[0] > 10 * recipes[1]
    assert list(rates["0.5"].values()) == pytest.approx([rate / 2 for rate in recipes], rel=1e-3)

    model, method = wrap("prompt_tuning_and_lora", random_model("llama"))
    values = parse(["--model_name_or_path", "m", "--train_file", "f", "--use_lora", "--use_prompt_tuning",
                    "--lora_learning_rate_ratio", "0.1", "--loraplus_ratio", "4"])[0]  # fmt: skip
    groups = method.parameter_groups(model, method.settings(vars(values)), 0.2)
    assert [group.get("lr") for group in groups] == [None, pytest.approx(0.02), pytest.approx(0.08)]
    identities = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(identities) == sorted(map(id, trained_of(model).values())) and len(groups[0]["params"]) == 1
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {"lora_B" in names[id(parameter)] for parameter in groups[2]["params"]} == {True}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_base_computes_and_comes_back_as_it_was(prompt):
    base = random_model("llama")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
        model, _ = wrap(f"{prompt}_and_lora", base)
        with base_only(model):
            torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0)
        assert (model(input_ids=ids).logits[:, -ids.shape[1] :] - before).abs().max() > 0.1  # and they are back
    bases, key = Bases(), SimpleNamespace(trains_base=False, key="k", name="llama")
    bases.loaded["k"] = base, [weight.sum(dtype=torch.float64).item() for weight in weights.values()]
    bases.give_back(key, model)
    assert not hasattr(base, "peft_config") and dict(base.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in base.named_parameters())


def test_the_sub_folders_are_the_runs_own(train, tmp_path):
    """A later run replaces them, and leaves alone what others put there."""
    run = train("run", *ONE_STEP_OF_BOTH)
    assert run.code == 0, run.err
    note = run.folder / "lora" / "note.txt"
    note.write_text("precious")
    plain = train("run", *ONE_STEP, "--overwrite_output_dir")
    assert plain.code == 0 and [path.name for path in (run.folder / "lora").iterdir()] == ["note.txt"], plain.err
    assert not (run.folder / "soft_prompt").exists() and (run.folder / "adapter_config.json").exists()
    (run.folder / "lora" / "adapter_config.json").write_text("precious")
    refused = train("run", *ONE_STEP_OF_BOTH, "--overwrite_output_dir")
    assert refused.code == 2 and "lora/adapter_config.json" in refused.err and refused.err.count("\n") == 1


BOTH = ["--use_lora", "--use_prompt_tuning"]


@pytest.mark.parametrize(
    "words, says",
    [
        ([*BOTH, "--use_p_tuning"], "exclude each other: choose one method, or LoRA and a soft prompt"),
        (["--use_ia3", "--use_prompt_tuning"], "exclude each other"),
        ([*BOTH, "--adapter_name_or_path", "x"], "two methods are trained together as new adapters only"),
        ([*BOTH, "--new_tokens", "<a>"], "embeddings that LoRA does not change"),
        ([*BOTH, "--modules_to_save", "lm_head"], "would save these modules with the soft prompt, too"),
        (["--use_lora", "--lora_learning_rate_ratio", "2"], "no soft prompt is trained with LoRA"),
        (["--use_p_tuning", "--lora_learning_rate_ratio", "2"], "has no meaning for p_tuning"),
        ([*BOTH, "--vera_rank", "3"], "has no meaning for lora and prompt_tuning"),
        ([*BOTH, "--prefix_init", "zero"], "has no meaning for lora and prompt_tuning"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, says):
    flags, given = parse(["--model_name_or_path", "m", "--train_file", "f", *words])
    with pytest.raises(ValueError, match=re.escape(says)):
        check_flags(flags, given)


@pytest.mark.parametrize(
    "words, model, says",
    [
        ([], TINY_T5, "can't be trained together on an encoder–decoder"),
        (["--lora_target_modules", "embed_tokens", "q_proj"], TINY_MODEL, "names the embeddings of the input"),
    ],
)
def test_models_and_modules_that_do_not_fit_are_refused(words, model, says, train):
    run = train("run", *BOTH, *words, model=model)
    assert run.code == 2 and says in run.err and run.err.count("\n") == 1, run.err


def test_a_pair_is_not_continued_nor_shared_and_a_foreign_one_not_used(train, tmp_path, capsys, monkeypatch):
    run = train("run", *ONE_STEP_OF_BOTH, "--num_virtual_tokens", "6")
    words = ["--train_file", "x", "--output_dir", str(tmp_path / "o"), "--adapter_name_or_path"]
    assert finetune([*words, str(run.folder)]) == 2
    assert "a pair can't be trained further: name " in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="which vLLM does not know: merge it"):
        patch.setattr(importlib.util, "find_spec", lambda name: name)  # as if vLLM were installed
        check_engine(parse_adapters([str(run.folder)]))
    assert load_file(run.folder / PARTS[0])["prompt_embeddings"].shape[0] == 6
    config = run.folder / "soft_prompt" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LORA"}))
    assert generate_main(["--adapter", str(run.folder), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert "soft_prompt (LORA) and lora (LORA), which are no soft prompt and LoRA" in error and error.count("\n") == 1


def test_a_study_names_both():
    problems = []
    spec = method_spec("pair", {"method": "p_tuning_and_qlora"}, (), "grid", problems)
    flags = dict(make_trial(SimpleNamespace(flags={}, seeds=(1,)), spec, {}, 1).flags)
    assert not problems and flags["use_p_tuning"] is flags["use_qlora"] is True and "use_lora" not in flags
    assert COMBINED["p_tuning_and_qlora"].quantises_base == "4bit"
