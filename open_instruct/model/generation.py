"""Greedy answers that don't depend on which other questions share the batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None = None,
    batch_size: int = 32,
) -> list[str]:
    """Answer each prompt (token ids).

    Only prompts of equal length share a batch: left padding shifts what soft prompts compute, and right padding has no
    meaning in generation.

    Args:
        model: a causal language model or a PeftModel.
        tokenizer: decodes the answers.
        prompts: token ids of each prompt.
        max_new_tokens: tokens of an answer at most.
        max_length: prompt and answer together at most, virtual tokens not counted.
        batch_size: prompts in a batch at most.

    Returns:
        The answers in the order of the prompts, without special tokens and surrounding white space.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    answers = [""] * len(prompts)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for length, indices in by_length.items():
        room = min(max_new_tokens, max_length - length) if max_length else max_new_tokens
        for start in range(0, len(indices) if room > 0 else 0, batch_size):
            chosen = indices[start : start + batch_size]
            ids = torch.tensor([list(prompts[i]) for i in chosen], device=device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=room,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, row in zip(chosen, out[:, length:], strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    model.train(was_training)
    return answers
