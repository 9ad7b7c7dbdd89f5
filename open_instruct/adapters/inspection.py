"""What a trained soft prompt looks like in numbers: neighbours in the vocabulary, norms, similarities, drift, attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.folders import AdapterFolder
from open_instruct.model.tokens import ordinary_tokens

START = "soft_prompt_start.safetensors"  # beside the adapter: the vectors before the first step


@torch.no_grad()
def vocabulary_vectors(base: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, list[int]]:
    """Embeddings [V', D] of the tokens that stand for text, as the decoder takes them, and their ids."""
    ids = ordinary_tokens(tokenizer)
    return base.get_input_embeddings()(torch.tensor(ids, device=base.device)).float().cpu(), ids


def start_of(folder: AdapterFolder) -> torch.Tensor | None:
    """The soft prompt [P, D] before the first step, where the run kept it."""
    path = folder.path / START
    return load_file(path)["embeddings"] if path.is_file() else None


def drift(folder: AdapterFolder, start: torch.Tensor) -> list[dict[str, float]]:
    """How far each checkpoint's soft prompt is from the start: mean distance of a virtual token, and mean norm.

    Prompt tuning only: P-tuning's checkpoints hold the network, not its output.
    """
    found = []
    for path in sorted(folder.path.glob("checkpoints/step_*/trained.safetensors"), key=step_of):
        tensors = [tensor for name, tensor in load_file(path).items() if tensor.shape == start.shape]
        if folder.method == "PROMPT_TUNING" and len(tensors) == 1:
            distance = (tensors[0] - start).norm(dim=1).mean().item()
            found.append({"step": step_of(path), "distance": distance, "norm": tensors[0].norm(dim=1).mean().item()})
    return found


def step_of(path: Path) -> int:
    """Step of a checkpoint's file."""
    return int(path.parent.name.removeprefix("step_"))


def neighbours(
    prompt: torch.Tensor, vocabulary: torch.Tensor, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[dict[str, Any]]:
    """The nearest tokens of each virtual token, by cosine and by distance.

    Args:
        prompt: [P, D]
        vocabulary: [V', D]
        ids: of its rows.
        tokenizer: for their texts.
        count: neighbours of each.
    """
    cosine = F.normalize(prompt, dim=1) @ F.normalize(vocabulary, dim=1).T
    distance = torch.cdist(prompt, vocabulary)
    found = []
    count = min(count, len(ids))

    def named(top: Any) -> list[list[Any]]:
        return [
            [tokenizer.decode([ids[i]]), round(value, 4)]
            for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]

    for number in range(len(prompt)):
        near, close = cosine[number].topk(count), distance[number].topk(count, largest=False)
        found.append({"norm": prompt[number].norm().item(), "cosine": named(near), "distance": named(close)})
    return found


def norms(vectors: torch.Tensor) -> dict[str, float]:
    """Quantiles of the vectors' lengths."""
    quantiles = vectors.norm(dim=1).quantile(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0])).tolist()
    return dict(zip(("smallest", "5 %", "median", "95 %", "largest"), quantiles, strict=True))


def similarity(prompt: torch.Tensor) -> torch.Tensor:
    """Cosines [P, P] of the virtual tokens with each other."""
    unit = F.normalize(prompt, dim=1)
    return unit @ unit.T


@torch.no_grad()
def attention_mass(
    model: Any, base: Any, prompts: Sequence[Sequence[int]], num_virtual_tokens: int
) -> dict[str, list[float]]:
    """Share of its attention that each layer gives to the virtual tokens, mean over heads, real positions and rows.

    Args:
        model: PeftModel with the soft prompt.
        base: inside it; its attention is computed as plain matrix products meanwhile.
        prompts: token ids of sample rows.
        num_virtual_tokens: P.

    Returns:
        mass: of each layer, from 0 to 1; uniform: what it would be if all visible positions got the same, one number.
    """
    own = base.config._attn_implementation
    base.set_attn_implementation("eager")
    total, uniform, positions = None, 0.0, 0
    try:
        for ids in prompts:
            rows = torch.tensor([list(ids)], device=base.device)
            # [1, H, queries, P + T] of each layer; soft prompts of embeddings are queries, too
            layers = model(input_ids=rows, attention_mask=torch.ones_like(rows), output_attentions=True).attentions
            mass = torch.stack(
                [layer[0, :, -len(ids) :, :num_virtual_tokens].float().sum(-1).mean(0).sum() for layer in layers]
            )
            total = mass if total is None else total + mass
            uniform += sum(num_virtual_tokens / (num_virtual_tokens + place) for place in range(1, len(ids) + 1))
            positions += len(ids)
    finally:
        base.set_attn_implementation(own)
    assert total is not None
    return {"mass": (total / positions).tolist(), "uniform": [uniform / positions]}


def prefix_norms(model: Any) -> dict[str, list[float]]:
    """Mean length of a prefix's keys and values in each layer (over heads and virtual tokens)."""
    layers = model.get_prompt(batch_size=1).layers
    return {
        "keys": [layer.keys.float().norm(dim=-1).mean().item() for layer in layers],
        "values": [layer.values.float().norm(dim=-1).mean().item() for layer in layers],
    }


@torch.no_grad()
def base_norms(base: Any, prompts: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """The same of the base's own keys and values on sample rows, to compare with."""
    keys, values = [], []
    for ids in prompts:
        cache = base(input_ids=torch.tensor([list(ids)], device=base.device), use_cache=True).past_key_values
        keys.append([layer.keys.float().norm(dim=-1).mean().item() for layer in cache.layers])
        values.append([layer.values.float().norm(dim=-1).mean().item() for layer in cache.layers])
    return {"keys": torch.tensor(keys).mean(0).tolist(), "values": torch.tensor(values).mean(0).tolist()}
