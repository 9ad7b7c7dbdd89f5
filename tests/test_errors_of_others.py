"""docs/errors.md quotes what the installed libraries say, and what it recommends instead works."""

from __future__ import annotations

import inspect
import re

import pytest
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import open_instruct
from tests.conftest import ROOT, TINY_MODEL

PAGE = " ".join((ROOT / "docs" / "errors.md").read_text().split())
SOFT_PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")


def refusal(attempt) -> str:
    """The words with which a library refuses something."""
    with pytest.raises(Exception) as raised:
        attempt()
    return str(raised.value)


@pytest.mark.parametrize("method", SOFT_PROMPTS)
def test_the_page_has_the_words_in_which_soft_prompts_are_refused(method, trained):
    folder, base = str(trained / method), AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    for attempt in (lambda: base.load_adapter(folder), lambda: AutoModelForCausalLM.from_pretrained(folder)):
        assert refusal(attempt) in PAGE
    words = refusal(lambda: pipeline("text-generation", model=folder))
    assert (
        re.sub(r" with any of.*", " with any of the following classes", words.replace(folder, "DIR"), flags=re.S)
        in PAGE
    )
    assert refusal(lambda: PeftModel.from_pretrained(base, folder, is_trainable=True)) in PAGE
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), folder)
    words = refusal(lambda: wrapped.load_adapter(str(trained / "lora"), "second"))
    assert words.split(" Found ")[0] in PAGE
    with pytest.raises(AssertionError):  # another library's words are not there
        assert refusal(lambda: AutoModelForCausalLM.from_pretrained(trained / "nowhere")) in PAGE


def test_the_page_has_the_words_of_the_trainer():
    source = re.sub(r"\"\s+f?\"", "", inspect.getsource(transformers.trainer))
    for words in (
        "When using prompt learning PEFT methods such as ",
        "setting load_best_model_at_end=True can lead to",
    ):
        assert words in source and words in PAGE


@pytest.mark.parametrize("method", SOFT_PROMPTS)
def test_what_the_page_recommends_answers_alike(method, trained):
    """PeftModel and the tools here, which hold LoRA beside it."""
    folder = trained / method
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY_MODEL), folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "narrow dry old open"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    served = open_instruct.load([f"a={folder}", f"b={trained / 'lora'}"])
    sampling = open_instruct.Sampling(max_new_tokens=8)
    (answer,), (other,) = (served.answers(["narrow dry old open"], name, sampling)[0] for name in ("a", "b"))
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == answer.strip() != "" and other
