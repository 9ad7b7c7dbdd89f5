"""Packed equals padded: the same loss of every token and the same gradient, for every method and architecture."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from open_instruct.data import collate
from open_instruct.errors import InputError
from open_instruct.methods import METHODS, MethodSettings
from open_instruct.model import backends, shared_prefix
from open_instruct.model.backends import BACKENDS
from open_instruct.model.shared_prefix import Segments
from open_instruct.model.training_model import PackedModel, PaddedModel, TrainingModel

P, VOCAB = 5, 120
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 9},
    "olmo2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 9},
    "gemma2": {
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 2},
    "gpt_neox": {"attention_dropout": 0.0},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
}  # fmt: skip
SETTINGS = MethodSettings(
    num_virtual_tokens=P, prompt_tuning_init="random", prefix_init="random", lora_rank=4, lora_dropout=0.0
)
VARIANTS = ["full", "lora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "projected prefix"]


def random_model(architecture: str) -> Any:
    """A tiny model of a real architecture."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **COMMON, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the small initial weights, so that attention is not uniform
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def wrap(variant: str, base: Any) -> tuple[Any, Any]:
    """(adapted model that is not at its neutral start, its method)."""
    method = METHODS["prefix_tuning" if variant == "projected prefix" else variant]
    tokenizer = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={}, get_vocab=lambda: {str(i): i for i in range(VOCAB)}
    )
    torch.manual_seed(1)
    model = method.wrap(base, tokenizer, replace(SETTINGS, prefix_projection=variant == "projected prefix"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model, method


def examples() -> list[dict[str, Any]]:
    """Ragged examples, longer and shorter than the sliding window, with labels from the first token on or late."""
    generator = torch.Generator().manual_seed(3)
    lengths, spans = (7, 40, 2, 23, 31), ([0, 7], [10, 20, 30, 40], [1, 2], [22, 23], [5, 31])
    ids = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": i, "spans": s} for i, s in zip(ids, spans, strict=True)]


def packed_model(model: Any, method: Any, backend: str = "blocked") -> PackedModel:
    """As training makes it."""
    return PackedModel(model, partial(method.soft_prompt, model), BACKENDS[backend])


def step(model: TrainingModel, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Summed loss and the gradient of everything that is trained."""
    model.train()
    model.zero_grad()
    loss, count = model(**batch)
    loss.backward()
    assert (
        count == sum(len(range(*e["spans"][i : i + 2])) for e in examples() for i in range(0, len(e["spans"]), 2)) - 1
    )
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def padded_token_losses(model: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Loss of each labelled token by PEFT's forward, in the order of the rows."""
    batch = collate.pad(rows, 0)
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits, targets = logits[:, -batch["labels"].shape[1] :][:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=collate.IGNORE)[
        targets != collate.IGNORE
    ]


@torch.no_grad()
def packed_token_losses(model: PackedModel, rows: list[dict[str, Any]]) -> torch.Tensor:
    """The same, from one packed row."""
    batch, seen, head = collate.pack(rows), [], model.head
    model.eval().head = lambda hidden: seen.append(head(hidden)) or seen[-1]
    model(**batch)
    model.head = head
    return F.cross_entropy(torch.cat(seen), batch["targets"], reduction="none")


def differences(
    architecture: str, variant: str, backend: str = "blocked", checkpointing: bool = False
) -> tuple[float, float, float]:
    """Largest relative difference of a token's loss, difference of the loss, and relative error of the gradient."""
    base = random_model(architecture)
    model, method = wrap(variant, base)
    rows = examples()
    expected_loss, expected = step(PaddedModel(model), collate.pad(rows, 0))
    expected_tokens = padded_token_losses(model, rows)
    packed = packed_model(model, method, backend)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = step(packed, collate.pack(rows))
    tokens = packed_token_losses(packed, rows)
    assert expected.norm() > 1e-3 and len(tokens) == len(expected_tokens)
    return (
        ((tokens - expected_tokens).abs() / expected_tokens.abs().clamp(min=1)).max().item(),
        abs(loss - expected_loss) / expected_loss,
        ((gradient - expected).norm() / expected.norm()).item(),
    )


PAIRS = [
    (architecture, variant)
    for architecture in ARCHITECTURES
    for variant in VARIANTS
    if (architecture, variant) != ("phi3", "ia3")
]


@pytest.mark.parametrize("architecture, variant", PAIRS)
def test_packed_equals_padded(architecture, variant):
    assert max(differences(architecture, variant)) < 1e-5


def test_ia3_on_phi3_is_refused():
    """Phi-3 has one matrix for queries, keys and values, which IA3 can't scale apart."""
    with pytest.raises(InputError, match="use --use_lora"):
        wrap("ia3", random_model("phi3"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(variant):
    assert max(differences("llama", variant, checkpointing=True)) < 1e-5


@pytest.mark.parametrize("variant", ["lora", "prefix_tuning"])
def test_gradient_checkpointing_recomputes_the_layers(variant, monkeypatch):
    """Or the test above shows nothing."""
    calls = []
    monkeypatch.setitem(BACKENDS, "counted", lambda *inputs: calls.append(1) or backends.blocked(*inputs))
    differences("llama", variant, "counted", checkpointing=True)
    assert len(calls) == 3 * 3  # three layers: forward, recomputation, and the evaluation of token losses


@pytest.mark.parametrize("backend", ["sdpa", "reference", "small blocks", "one by one"])
@pytest.mark.parametrize("variant", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_every_back_end_computes_the_same(architecture, variant, backend, monkeypatch):
    if backend == "small blocks":
        monkeypatch.setattr(backends, "BLOCK", 8)
    if backend in ("small blocks", "one by one"):
        monkeypatch.setattr(backends, "TOGETHER", 0)
    backends._groups.cache_clear()
    monkeypatch.setitem(BACKENDS, "reference", partial(backends.varlen, reference_kernel))
    monkeypatch.setitem(BACKENDS, "small blocks", backends.blocked)
    monkeypatch.setitem(BACKENDS, "one by one", backends.blocked)
    assert max(differences(architecture, variant, backend)) < 1e-5
    backends._groups.cache_clear()


def test_short_segments_are_computed_together():
    """Unless a window would cut one of them, or the shared keys differ."""
    segments = Segments(((0, 5), (5, 12), (12, 52), (52, 54), (54, 154)), num_head=5, num_shared=5)
    assert [group[3] for group in backends._groups(segments, None)] == [(5,), (7, 40, 2), (100,)]
    assert [group[3] for group in backends._groups(segments, 20)] == [(5,), (7,), (40,), (2,), (100,)]
    assert [group[3] for group in backends._groups(segments, 45)] == [(5,), (7, 40, 2), (100,)]


def reference_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap):
    """What variable-length flash attention computes, by its documentation.

    Sequence i has queries cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1]; the causal mask is aligned to the bottom right
    corner; a window of (left, 0) counts from the diagonal.
    """
    outputs = []
    groups = q.shape[1] // k.shape[1]
    assert (
        max_q == cu_q.diff().max()
        and max_k == cu_k.diff().max()
        and cu_q[-1] == len(q)
        and cu_k[-1] == len(k) == len(v)
    )
    for i in range(len(cu_q) - 1):
        qi, ki, vi = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
        ki, vi = ki.repeat_interleave(groups, 1), vi.repeat_interleave(groups, 1)
        scores = torch.einsum("qhe,khe->hqk", qi, ki) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(qi))[:, None] + len(ki) - len(qi) - torch.arange(len(ki))[None]
        hidden = (distance < 0) | (distance >= (window or len(ki) + 1))
        outputs.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(hidden, float("-inf")).softmax(-1), vi))
    return torch.cat(outputs)


def test_the_index_arithmetic_of_variable_length_attention():
    inside = backends.varlen_index(
        Segments(((0, 2), (2, 5), (5, 6)), num_head=2, num_shared=2), False, torch.device("cpu")
    )
    assert inside[0].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5]
    assert [inside[1].tolist(), inside[2].tolist(), *inside[3:]] == [[0, 2, 5, 6], [0, 2, 7, 10], 3, 5]
    outside = backends.varlen_index(Segments(((0, 3), (3, 4)), num_head=0, num_shared=2), True, torch.device("cpu"))
    assert outside[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 5]
    assert [outside[1].tolist(), outside[2].tolist(), *outside[3:]] == [[0, 3, 4], [0, 5, 8], 3, 5]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mask_that_lets_an_example_see_another_is_noticed(variant, monkeypatch):
    def leaky(self, num_shared):
        return Segments(((0, self.num_head + sum(self.lengths)),), 0, num_shared if self.prefix else 0)

    monkeypatch.setattr(shared_prefix.Row, "segments", leaky)
    assert max(differences("llama", variant)) > 1e-3


@pytest.mark.parametrize("variant", ["prompt_tuning", "p_tuning", "prefix_tuning", "projected prefix"])
def test_positions_that_are_off_by_one_are_noticed(variant, monkeypatch):
    pack = collate.pack
    monkeypatch.setattr(collate, "pack", lambda rows: (b := pack(rows)) | {"position_ids": b["position_ids"] + 1})
    assert max(differences("llama", variant)) > 1e-3


def test_positions_that_do_not_restart_are_noticed(monkeypatch):
    pack = collate.pack
    monkeypatch.setattr(
        collate, "pack", lambda rows: (b := pack(rows)) | {"position_ids": torch.arange(b["input_ids"].numel())[None]}
    )
    assert max(differences("llama", "prompt_tuning")) > 1e-3


def test_a_window_that_is_off_by_one_is_noticed(monkeypatch):
    wide = lambda *inputs: backends.blocked(*inputs[:-2], inputs[-2] + 1, inputs[-1])  # noqa: E731
    monkeypatch.setitem(BACKENDS, "wide", wide)
    assert max(differences("mistral", "prefix_tuning", "wide")) > 1e-3


@pytest.mark.parametrize("variant", ["prompt_tuning", "prefix_tuning", "lora"])
def test_without_the_adapter_it_is_the_base_model(variant):
    model, method = wrap(variant, random_model("llama"))
    rows = examples()
    packed = packed_model(model, method)
    with packed.without_adapter():
        tokens = packed_token_losses(packed, rows)
    expected = padded_token_losses(random_model("llama"), rows)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    assert (packed_token_losses(packed, rows) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_process_without_examples_adds_nothing_but_takes_part(variant):
    model, method = wrap(variant, random_model("llama"))
    packed = packed_model(model, method)
    total, count = packed(**collate.Packing(64).collate([]))
    total.backward()
    assert total.item() == 0 and count.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_release_gives_the_models_own_attention_back():
    model, method = wrap("prefix_tuning", random_model("llama"))
    expected = padded_token_losses(model, examples())
    packed = packed_model(model, method)
    packed.release()
    assert torch.equal(padded_token_losses(model, examples()), expected)
