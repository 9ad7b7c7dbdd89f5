"""Encoder–decoders: packed pairs equal each pair alone; pairs are tokenised, cut, batched, answered and refused."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from open_instruct.adapters.generation import Sampling, generate
from open_instruct.adapters.scoring import answer_losses
from open_instruct.data import chat
from open_instruct.data.pairs import (
    PairPacking,
    PairPadding,
    fit_pair,
    pack_pairs,
    pad_pairs,
    source_ids,
    split,
    tokenize_pairs,
)
from open_instruct.flags import default_values
from open_instruct.methods import METHODS
from open_instruct.model.encoder_decoder import PackedPairModel, PaddedPairModel, decoder_start_of
from open_instruct.model.shared_prefix import CannotPack
from open_instruct.training.forward_pairs import try_packed
from tests.conftest import TINY_T5
from tests.tiny_models import gradient_error

VOCAB = 120
T5 = {"d_model": 32, "d_ff": 64, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.1}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_start_token_id": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 256,
}  # fmt: skip
GEMMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
SOFTCAPPED = {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gated t5": (
        "t5", {**T5, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3, "feed_forward_proj": "gated-gelu",
               "tie_word_embeddings": False},
    ),
    "tied t5, wide heads": ("t5", {**T5, "d_kv": 16, "num_layers": 4, "tie_word_embeddings": True}),
    "umt5": ("umt5", {**T5, "d_kv": 8, "num_layers": 3}),
    "bart": ("bart", {**BART, "scale_embedding": True}),
    "mbart": ("mbart", BART),
    "t5gemma": ("t5gemma", {"encoder": SOFTCAPPED, "decoder": SOFTCAPPED}),
}  # fmt: skip
PADDED_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "t5gemma2": (
        "t5gemma2", {"encoder": {"text_config": GEMMA, "vision_config": {**PICTURES, "image_size": 28}},
                     "decoder": GEMMA},
    ),
}  # fmt: skip
METHOD_NAMES = (
    "full", "lora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning at decoder",
    "p_tuning at decoder", "prefix_tuning at encoder", "prefix_tuning at cross",
    "prefix_tuning at encoder decoder cross",
)  # fmt: skip
CASES = [
    (architecture, method)
    for architecture in ARCHITECTURES
    for method in METHOD_NAMES
    if not (method == "ia3" and architecture in ("umt5", "mbart", "t5gemma"))  # PEFT does not know their layers
]


def random_model(name: str, vocab_size: int = VOCAB) -> Any:
    """Return a tiny model of a real architecture, far from its small initial weights."""
    torch.manual_seed(0)
    kind, values = copy.deepcopy({**ARCHITECTURES, **PADDED_ONLY}[name])
    for stack in [value for value in values.values() if isinstance(value, dict) and "vocab_size" in value]:
        stack["vocab_size"] = vocab_size
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2, **values)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.eval()


def wrap(method_name: str, base: Any) -> tuple[Any, Any]:
    """Return (adapted model that is not at its neutral start, its method)."""
    method_name, _, places = method_name.partition(" at ")
    method = METHODS[method_name]
    values = default_values(
        soft_prompt_at=places.split() or None,
        num_virtual_tokens=5,
        prompt_tuning_init="random",
        prefix_init="random",
        lora_rank=4,
        lora_dropout=0.0,
    )
    words = {str(i): i for i in range(VOCAB)}
    tokenizer = SimpleNamespace(all_special_ids=[0], added_tokens_decoder={}, get_vocab=lambda: words)
    torch.manual_seed(1)
    model: Any = method.wrap(base, tokenizer, method.settings(values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), method


def pairs() -> list[dict[str, Any]]:
    """Return ragged pairs, shorter and longer than the distances that T5 tells apart."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(5, 4), (23, 7), (11, 3), (1, 19)]
    ids = [torch.randint(3, VOCAB, (source + target,), generator=generator).tolist() for source, target in lengths]
    return [
        {"input_ids": row, "spans": [source, source + target]}
        for row, (source, target) in zip(ids, lengths, strict=True)
    ]


def token_losses(model: Any, one: dict[str, Any]) -> torch.Tensor:
    """Return the losses of a pair's target, from transformers' and PEFT's own forward on this pair alone."""
    source, target, _ = split(one)
    start = decoder_start_of(model.config)
    logits = model(
        input_ids=torch.tensor([source]),
        attention_mask=torch.ones(1, len(source)),
        decoder_input_ids=torch.tensor([[start, *target[:-1]]]),
        use_cache=False,
    ).logits[0]
    return F.cross_entropy(logits, torch.tensor(target), reduction="none")


def gradient_of(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def packed_of(model: Any, method: Any) -> PackedPairModel:
    return PackedPairModel(model, partial(method.soft_prompt, model), None)


@pytest.mark.parametrize("architecture, method_name", CASES)
def test_packed_pairs_equal_each_pair_alone(architecture, method_name):
    """Every token's loss, and the gradient of everything that is trained."""
    model, method = wrap(method_name, random_model(architecture))
    expected = torch.cat([token_losses(model, one) for one in pairs()])
    expected.sum().backward()
    gradient = gradient_of(model)
    model.zero_grad()
    start = decoder_start_of(model.config)
    with packed_of(model, method) as packed:
        found = []
        for index in range(len(pairs())):  # the losses of one pair at a time, in the row of all
            batch = pack_pairs(pairs(), start)
            ends = torch.tensor([target for _, target in batch["lengths"]]).cumsum(0).tolist()
            chosen = slice(ends[index] - batch["lengths"][index][1], ends[index])
            only = {name: batch[name][chosen] for name in ("target_positions", "targets")}
            found.append(packed(**{**batch, **only})[0].item())
        loss, count = packed(**pack_pairs(pairs(), start))
        loss.backward()
    assert count == sum(len(split(one)[1]) for one in pairs())
    sums = [token_losses(model, one).sum().item() for one in pairs()]
    assert found == pytest.approx(sums, rel=1e-5)
    assert loss.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert gradient_error(gradient_of(model), gradient) < 1e-4


@pytest.mark.parametrize("mistake", ["boundary", "distances", "source", "order"])
def test_a_wrong_row_is_found(mistake, monkeypatch):
    """Boundaries off by one, a prefix without its distances, a decoder that sees another source, a future token."""
    from open_instruct.model import encoder_decoder, pair_attention

    model, method = wrap("prefix_tuning", random_model("gated t5"))
    own = encoder_decoder.bounds_of
    if mistake == "boundary":
        monkeypatch.setattr(
            encoder_decoder, "bounds_of", lambda lengths: own([lengths[0] + 1, lengths[1] - 1, *lengths[2:]])
        )
    if mistake == "distances":
        monkeypatch.setattr(pair_attention, "prefix_bias", lambda table, p, t, like: like.new_zeros(1, 1, t, p))
    if mistake == "order":
        monkeypatch.setattr(pair_attention, "hidden_keys", lambda *sizes: None)
    expected = sum(token_losses(model, one).sum().item() for one in pairs())
    batch = pack_pairs(pairs(), 0)
    if mistake == "source":  # each target beside another pair's source
        batch["lengths"] = tuple(
            (batch["lengths"][i][0], batch["lengths"][j][1]) for i, j in ((0, 2), (1, 1), (2, 0), (3, 3))
        )
    with packed_of(model, method) as packed, torch.no_grad():
        found = packed(**batch)[0].item()
    assert abs(found / expected - 1) > 1e-3


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *PADDED_ONLY])
def test_padded_pairs_equal_each_pair_alone(architecture):
    model, _ = wrap("lora", random_model(architecture))
    start = decoder_start_of(model.config)
    expected = [token_losses(model, one).sum().item() for one in pairs()]
    with torch.no_grad():
        loss, count = PaddedPairModel(model)(**pad_pairs(pairs(), 0, start))
    assert loss.item() == pytest.approx(sum(expected), rel=1e-5) and count == 33
    ids = [one["input_ids"] for one in pairs()]
    spans = [[tuple(one["spans"])] for one in pairs()]
    found = answer_losses(model, ids, spans, 3)
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)
    assert [number for _, number in found] == [4, 7, 3, 19]


def test_the_probe_agrees_with_exact_models_only(monkeypatch):
    """It takes what is exact, and gives a reason against what is not."""
    from open_instruct.model import encoder_decoder, pair_attention

    model, method = wrap("prefix_tuning", random_model("gated t5"))
    packed, reason = try_packed(model, method, 0, torch.float32)
    assert packed is not None and not reason
    monkeypatch.setattr(pair_attention, "prefix_bias", lambda table, p, t, like: like.new_zeros(1, 1, t, p))
    packed, reason = try_packed(model, method, 0, torch.float32)
    assert packed is None and "differs from its own" in reason
    monkeypatch.setattr(encoder_decoder, "kinds_of", lambda causal: (_ for _ in ()).throw(CannotPack("it can't")))
    assert try_packed(model, method, 0, torch.float32) == (None, "it can't")


def test_checkpointing_changes_nothing():
    model, method = wrap("prefix_tuning", random_model("gated t5"))
    gradients = []
    for is_checkpointed in (False, True):
        base = model.get_base_model()
        if is_checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.config.dropout_rate = 0.0
        model.zero_grad()
        with packed_of(model, method) as packed:
            packed.train()
            for module in packed.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout") and isinstance(module.dropout, float):
                    module.dropout = 0.0
            packed(**pack_pairs(pairs(), 0))[0].backward()
        gradients.append(gradient_of(model))
    torch.testing.assert_close(*gradients)


@pytest.fixture
def tokenizer() -> Any:
    words = AutoTokenizer.from_pretrained(TINY_T5)
    chat.mark_pairs(words)
    chat.set_chat_template(words, chat.PLAIN)
    return words


TALK = [
    {"role": "system", "content": "sort the words"},
    {"role": "user", "content": "lion cat"},
    {"role": "assistant", "content": "cat lion"},
    {"role": "user", "content": "fox bear"},
    {"role": "assistant", "content": "bear fox"},
]


def test_a_conversation_is_its_last_answer_and_what_precedes_it(tokenizer):
    """Tokenised apart, as the tokenizer does it alone; a user's turn after the last answer is left out."""
    text = "sort the words\nlion cat\ncat lion\nfox bear"
    source, target = tokenizer(text)["input_ids"], tokenizer("bear fox")["input_ids"]
    assert source[-1] == target[-1] == tokenizer.eos_token_id
    for talk in (TALK, [*TALK, {"role": "user", "content": "more"}]):
        (ids,), (spans,) = tokenize_pairs(tokenizer, [talk], 999)
        assert ids == [*source, *target] and spans == [(len(source), len(source) + len(target))]
    assert source_ids(tokenizer, [TALK[:-1]]) == [source]
    assert chat.tokenize(tokenizer, [TALK], 999) == tokenize_pairs(tokenizer, [TALK], 999)


def test_what_is_too_long_keeps_its_ends():
    ids, spans = list(range(10, 30)), [(12, 20)]
    assert fit_pair(ids, spans, 20) == (ids, spans)
    assert fit_pair(ids, spans, 12) == ([10, 11, 12, 21, *range(22, 30)], [(4, 12)])
    assert fit_pair(ids, spans, 5) == ([21, 22, 23, 24, 29], [(1, 5)])
    assert fit_pair(ids, spans, 2) == ([21, 29], [(1, 2)])


def test_rows_count_the_virtual_tokens_before_each_source():
    """Else a row of many short pairs would be as long as its virtual tokens make it; a longer pair stands alone."""
    lengths = np.array([10] * 20 + [70])
    rows = PairPacking(60, 0, num_virtual_tokens=20).micro_batches(range(21), lengths, 0, 1)
    assert sorted(index for row in rows for index in row) == list(range(21))
    assert max(sum(lengths[row] + 20) for row in rows) <= 90  # the longest pair's own
    assert len(PairPacking(60, 0).micro_batches(range(20), lengths, 0, 1)) == 4
    assert len(PairPacking(60, 0, num_virtual_tokens=20).micro_batches(range(20), lengths, 0, 1)) == 10


def test_batches_of_nothing():
    """A process that has no pair left computes a batch without labels."""
    for batching in (PairPacking(64, 7), PairPadding(4, 0, decoder_start=7)):
        batch = batching.collate([])
        labels = batch.get("labels")
        assert len(batch["targets"]) == 0 if labels is None else (labels == -100).all()


@pytest.mark.parametrize("method_name", ["lora", "prompt_tuning", "p_tuning", "prefix_tuning"])
def test_greedy_answers_are_the_forward_passs(method_name, tokenizer):
    """Token by token without a cache; also for P-tuning and prefixes, whose generation PEFT does by itself.

    (transformers 5.23 can't generate where the two stacks differ in depth.)
    """
    model, _ = wrap(method_name, random_model("tied t5, wide heads"))
    sampling = Sampling(max_new_tokens=6)
    prompts = [split(one)[0] for one in pairs()]
    found = dict(generate(model, tokenizer, prompts, sampling))
    for index, prompt in enumerate(prompts):
        read = [0]
        for _ in range(6):
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt)),
                    decoder_input_ids=torch.tensor([read]),
                    use_cache=False,
                ).logits[0, -1]
            read.append(int(logits.argmax()))
            if read[-1] == 2:
                break
        assert found[index] == [tokenizer.decode(read[1:], skip_special_tokens=True).strip()]
