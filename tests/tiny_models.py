"""Tiny models of real architectures with adapters, and their losses token by token: shared by several tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from open_instruct.data import packing
from open_instruct.flags import default_values
from open_instruct.methods import COMBINED, METHODS
from open_instruct.model.backends import BACKENDS
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
        "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 2},
    "gpt_neox": {"attention_dropout": 0.0},
    "granite": {"num_key_value_heads": 2, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
}  # fmt: skip
VALUES = default_values(
    num_virtual_tokens=P, prompt_tuning_init="random", prefix_init="random", lora_rank=4, lora_dropout=0.0
)
VARIANTS = [*(method.name for method in METHODS.values() if not method.quantises_base), "projected prefix"]


def random_model(architecture: str) -> Any:
    """Return a tiny model of a real architecture."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **COMMON, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from the small initial weights, so that attention is not uniform
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


def wrap(variant: str, base: Any) -> tuple[Any, Any]:
    """Return (adapted model that is not at its neutral start, its method)."""
    method = {**METHODS, **COMBINED}["prefix_tuning" if variant == "projected prefix" else variant]
    tokenizer = SimpleNamespace(
        all_special_ids=[0], added_tokens_decoder={}, get_vocab=lambda: {str(i): i for i in range(VOCAB)}
    )
    torch.manual_seed(1)
    values = VALUES | {"prefix_projection": variant == "projected prefix"}
    model = method.wrap(base, tokenizer, method.settings(values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model, method


def examples() -> list[dict[str, Any]]:
    """Return ragged examples, longer and shorter than the sliding window, with labels that begin early or late."""
    generator = torch.Generator().manual_seed(3)
    lengths, spans = (7, 40, 2, 23, 31), ([0, 7], [10, 20, 30, 40], [1, 2], [22, 23], [5, 31])
    ids = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": i, "spans": s} for i, s in zip(ids, spans, strict=True)]


def packed_model(model: Any, method: Any, backend: str = "blocked") -> PackedModel:
    """Return the model as training packs it, active."""
    packed = PackedModel(model, partial(method.soft_prompt, model), BACKENDS[backend])
    packed.activate()
    return packed


def gradient_error(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the larger of two relative errors: of any element, by the largest element, and of all, by the norm."""
    difference = gradient - expected
    return max((difference.abs().max() / expected.abs().max()).item(), (difference.norm() / expected.norm()).item())


def step(model: TrainingModel, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Return the summed loss and the gradient of everything that is trained."""
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
    """Return the loss of each labelled token by PEFT's forward, in the order of the rows."""
    batch = packing.pad(rows, 0)
    logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    logits, targets = logits[:, -batch["labels"].shape[1] :][:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=packing.IGNORE)[
        targets != packing.IGNORE
    ]


@torch.no_grad()
def packed_token_losses(
    model: PackedModel, rows: list[dict[str, Any]], collate: Callable[[Any], dict[str, Any]] = packing.pack
) -> torch.Tensor:
    """Return the same, from one packed row."""
    batch, seen, head = collate(rows), [], model.head
    model.eval().head = lambda hidden: seen.append(head(hidden)) or seen[-1]
    model(**batch)
    model.head = head
    return F.cross_entropy(torch.cat(seen), batch["targets"], reduction="none")


def differences(
    architecture: str, variant: str, backend: str = "blocked", checkpointing: bool = False
) -> tuple[float, float, float]:
    """Return the largest relative difference of a token's loss, that of the loss, and the error of the gradient."""
    base = random_model(architecture)
    model, method = wrap(variant, base)
    rows = examples()
    expected_loss, expected = step(PaddedModel(model), packing.pad(rows, 0))
    expected_tokens = padded_token_losses(model, rows)
    packed = packed_model(model, method, backend)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = step(packed, packing.pack(rows))
    tokens = packed_token_losses(packed, rows)
    assert expected.norm() > 1e-3 and len(tokens) == len(expected_tokens)
    return (
        ((tokens - expected_tokens).abs() / expected_tokens.abs().clamp(min=1)).max().item(),
        abs(loss - expected_loss) / expected_loss,
        gradient_error(gradient, expected),
    )
