"""Tokens of a vocabulary: those that stand for text, random ones, and a text's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from open_instruct.errors import InputError

PIECE = 8  # tokens of a context that stay together where a start is drawn from it


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that stand for text, in order.

    Special and unused ones are left out: their embeddings may never have been trained.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return sorted(set(tokenizer.get_vocab().values()) - special)


def random_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Return `count` ids that stand for text, drawn by torch's global generator."""
    candidates = ordinary_tokens(tokenizer)
    return [candidates[i] for i in torch.randint(0, len(candidates), (count,)).tolist()]


def context_places(length: int, count: int, num_starts: int) -> list[list[int]]:
    """Return choices of `count` places of a context to start a soft prompt from.

    The first is the context's beginning; each other one is pieces of it, drawn by torch's global generator, in their
    order (2508.17032). A context of fewer tokens is repeated.
    """
    places = [i % length for i in range(max(length, count))]
    starts = [places[:count]]
    num_pieces = -(-count // PIECE)
    for _ in range(num_starts - 1):
        firsts = torch.randint(0, len(places) - min(PIECE, count) + 1, (num_pieces,)).sort().values.tolist()
        starts.append([place for first in firsts for place in places[first : first + PIECE]][:count])
    return starts


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """Return exactly `count` ids: those of the text, repeated or cut.

    Raises:
        InputError: the text has no token.
    """
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"--prompt_tuning_init_text {text!r} has no token: give a text")
    return [ids[i % len(ids)] for i in range(count)]
