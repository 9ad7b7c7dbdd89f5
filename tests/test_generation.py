"""Answers and losses do not depend on the batch, draws follow the softmax, and answers end where turns do."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import open_instruct
from open_instruct import Sampling
from open_instruct.adapters.generation import generate, greedy_answers
from open_instruct.data import packing
from open_instruct.flags import default_values
from open_instruct.methods import METHODS
from tests.conftest import ADAPTERS, TINY_MODEL
from tests.test_shared_prefix import examples, packed_model, packed_token_losses, random_model, wrap

VALUES = default_values(num_virtual_tokens=6, prompt_tuning_init="sample_vocab", prefix_init="text", lora_rank=4)
QUESTIONS = [
    "horse apple",
    "knife",
    "goat brave kiwi young",
    "quiet storm",
    "small fast rich early hot quiet",
    "desert lemon",
]


def adapted(method: str):
    """The bundled model with an adapter that changes its answers, and the token ids of QUESTIONS."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    torch.manual_seed(0)
    settings = METHODS[method].settings(VALUES)
    model = METHODS[method].wrap(AutoModelForCausalLM.from_pretrained(TINY_MODEL), tokenizer, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), tokenizer, [tokenizer(text)["input_ids"] for text in QUESTIONS]


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_answer_does_not_depend_on_its_batch(method):
    model, tokenizer, prompts = adapted(method)
    together = greedy_answers(model, tokenizer, prompts, 12)
    alone = [greedy_answers(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    backwards = greedy_answers(model, tokenizer, prompts[::-1], 12, batch_size=2)[::-1]
    assert together == alone == backwards
    assert len(set(together)) > 1


@torch.no_grad()
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_left_padding_does_depend_on_it(method):
    """Negative control, and the reason for batches of equal length: PEFT's soft prompts shift under left padding."""
    model, tokenizer, prompts = adapted(method)
    short, long = torch.tensor([prompts[1]]), max(len(prompt) for prompt in prompts)
    gap = long - short.shape[1]
    padded = torch.nn.functional.pad(short, (gap, 0), value=tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(short), (gap, 0))
    expected = model(input_ids=short, attention_mask=torch.ones_like(short)).logits[0, -1]
    assert (model(input_ids=padded, attention_mask=mask).logits[0, -1] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_packed_loss_does_not_depend_on_its_row(variant):
    model, method = wrap(variant, random_model("llama"))
    packed, rows = packed_model(model, method), [row for row in examples() if row["spans"][0] > 0]
    alone = torch.cat([packed_token_losses(packed, [row]) for row in rows])
    for order in (rows, rows[::-1]):
        losses = dict(
            zip(map(id, order), packed_token_losses(packed, order).split(list(map(count_labels, order))), strict=True)
        )
        torch.testing.assert_close(torch.cat([losses[id(row)] for row in rows]), alone, rtol=1e-5, atol=1e-6)


def count_labels(row: dict) -> int:
    """Labelled tokens of an example whose first token is not labelled."""
    return sum(label != packing.IGNORE for label in packing.labels_of(row["input_ids"], row["spans"]))


def test_drawing_by_noise_draws_from_the_softmax():
    """Frequencies of first tokens against the probabilities that transformers' own warpers leave."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(TINY_MODEL),
        AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval(),
    )
    ids = tokenizer("green red")["input_ids"]
    sampling = Sampling(1, do_sample=True, temperature=1.5, top_k=5, num_return_sequences=2000)
    ((_, answers),) = list(generate(model, tokenizer, [ids], sampling, batch_size=2000))[-1:]
    with torch.no_grad():
        top = (model(torch.tensor([ids])).logits[0, -1] / 1.5).topk(5)
    for probability, token in zip(top.values.softmax(0).tolist(), top.indices.tolist(), strict=True):
        share = answers.count(tokenizer.decode([token], skip_special_tokens=True).strip()) / 2000
        assert share == pytest.approx(probability, abs=4 * math.sqrt(probability / 2000) + 1e-3)


def test_an_answer_ends_where_training_ended_turns(trained, tmp_path):
    """A template whose end of turn is not the tokenizer's end token: as one token, and as text of several."""
    served = open_instruct.load(str(trained / "prompt_tuning"))
    model, tokenizer = served.adapters.use("base"), served.tokenizer
    ids = tokenizer("red green blue stone", add_special_tokens=False)["input_ids"]
    text = served.tokenizer.decode(
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    )
    word = text.split()[1]
    for end in (f" {word}", f"{word}"):
        template = "{% for m in messages %}{% generation %}{{ m['content'] }}END{% endgeneration %}{% endfor %}"
        tokenizer.chat_template = template.replace("END", end)
        ((_, (answer,)),) = generate(model, tokenizer, [ids], Sampling(12))
        assert word not in answer
