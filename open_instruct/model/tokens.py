"""Tokens of a vocabulary: those that stand for text, random ones, and a text's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from open_instruct.errors import InputError


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that stand for text, in order: no special and no unused ones, whose embeddings may never have been trained."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted(set(tokenizer.get_vocab().values()) - special)


def random_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """`count` ids that stand for text, drawn by torch's global generator."""
    known = ordinary_tokens(tokenizer)
    return [known[i] for i in torch.randint(0, len(known), (count,)).tolist()]


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """Exactly `count` ids: the text's, repeated or cut."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"--prompt_tuning_init_text {text!r} has no token: give a text")
    return [ids[i % len(ids)] for i in range(count)]
