"""Base and adapters in one process: loaded together, switched, and queried."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

import open_instruct
from open_instruct import InputError, Sampling
from open_instruct.adapters import loaded
from tests.conftest import ADAPTERS, TINY_MODEL, questions_of


def test_adapters_of_all_methods_share_a_base_and_answer_as_alone(trained, questions_file):
    """In any order of use, each gives what plain PEFT gives with nothing else loaded."""
    mixed = open_instruct.load([str(trained / method) for method in ADAPTERS])
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    ids = torch.tensor([tokenizer("green red blue")["input_ids"]])
    alone = {"base": AutoModelForCausalLM.from_pretrained(TINY_MODEL)(ids).logits}
    for method in ADAPTERS:
        alone[method] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), trained / method)(
            ids
        ).logits
    with torch.no_grad():
        for name in [
            "ia3",
            "lora",
            "base",
            "prefix_tuning",
            "vera",
            "prompt_tuning",
            "lora",
            "base",
            "p_tuning",
            "ia3",
        ]:
            torch.testing.assert_close(mixed.adapters.use(name)(ids).logits, alone[name], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(alone["lora"], alone["base"], atol=1e-2) and not torch.allclose(
        alone["ia3"], alone["base"], atol=1e-2
    )


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "lora"])
@pytest.mark.parametrize(
    "sampling", [Sampling(16), Sampling(16, do_sample=True, temperature=3.0, top_p=0.9, num_return_sequences=3)]
)
def test_answers_do_not_depend_on_the_batch(method, sampling, trained, questions_file):
    served = open_instruct.load(str(trained / method))
    texts = questions_of(questions_file, 12)
    together = served.answers(texts, sampling=sampling, batch_size=7)
    alone = [served.answers([text], sampling=sampling)[0] for text in texts]
    assert together == alone
    assert all(len(answers) == sampling.num_return_sequences for answers in together)
    if sampling.do_sample:
        assert any(len(set(answers)) > 1 for answers in together)
        reseeded = Sampling(16, do_sample=True, temperature=3.0, top_p=0.9, num_return_sequences=3, seed=7)
        assert served.answers(texts, sampling=reseeded) != together


def test_an_adapter_that_another_tool_made_will_do(tmp_path):
    """Plain PEFT: no run.json, no tokenizer, other layers than ours, and a name that PEFT can't use for its parts."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(TINY_MODEL),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    folder = tmp_path / "v1.5 lora"
    model.save_pretrained(folder)
    served = open_instruct.load(f"p.x={folder}", chat_template_name="tulu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(served.adapters.use("p.x")(ids).logits, model.eval()(ids).logits)


def test_names_that_are_not_there(trained):
    served = open_instruct.load(str(trained / "lora"))
    with pytest.raises(InputError, match="no adapter 'x': there are base, lora"):
        served.answers(["a"], "x")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = open_instruct.nothing


def test_layers_that_an_adapter_replaces_are_switched_too(tmp_path):
    """Another tool's LoRA with a trained head: the base beside it stays the base."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["norm"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(TINY_MODEL), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "normed")
    served = open_instruct.load(str(tmp_path / "normed"), chat_template_name="tulu")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(TINY_MODEL)(ids).logits
        torch.testing.assert_close(served.adapters.use("normed")(ids).logits, model(ids).logits)
        torch.testing.assert_close(served.adapters.use("base")(ids).logits, bare)
        assert not torch.allclose(model(ids).logits, bare, atol=0.1)


def test_virtual_tokens_take_positions_of_the_context(trained):
    """With several adapters, the longest prompt counts; the base has the whole context."""
    served = open_instruct.load([str(trained / name) for name in ("lora", "prefix_tuning")])
    context = served.adapters.base.config.max_position_embeddings
    assert served.max_length("base") == served.max_length("lora") == served.max_length("base", "lora") == context
    assert served.max_length("prefix_tuning") == served.max_length("lora", "prefix_tuning") == context - 20
    assert loaded.max_length(PretrainedConfig(), 20) is None


def test_what_can_not_share_a_base_is_refused(trained, tmp_path):
    """Different chat templates, unless one is given for all; and an adapter that trains the base's biases."""
    for name in ("lora", "ia3"):
        shutil.copytree(trained / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    template = tmp_path / "ia3" / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    both = [str(tmp_path / "lora"), str(tmp_path / "ia3")]
    with pytest.raises(InputError, match="the adapters lora, ia3 were trained with different chat templates"):
        open_instruct.load(both)
    assert open_instruct.load(both, chat_template_name="tulu").names == ["lora", "ia3"]
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": "all"}))
    with pytest.raises(InputError, match="adapter lora trains the base's biases"):
        open_instruct.load(both[0])
