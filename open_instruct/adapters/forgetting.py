"""Losses on plain text that was not trained for, of which all tokens count: what they rose by was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters import answer_metrics
from open_instruct.adapters.scoring import answer_losses
from open_instruct.data import chat
from open_instruct.data.context import Context
from open_instruct.data.plain_text import passages
from open_instruct.errors import InputError

FLAG = "--other_text"
NAME = "other_text"  # its figures begin with it
MAX_WINDOW = 2048  # tokens: longer passages are cut, as the logits of a book at once fit no memory


def chosen_passages(source: str, max_samples: int | None, seed: int) -> list[str]:
    """Return the passages of a plain text, in its order: all, or `max_samples` of them, drawn by seed.

    Raises:
        InputError: it can't be read, or holds none.
    """
    texts = list(passages(source, f"{FLAG} {source}"))
    if not texts:
        raise InputError(f"{FLAG} {source} holds no text: name another, or drop the flag")
    return [texts[i] for i in answer_metrics.chosen_rows(len(texts), max_samples, seed)]


def passage_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], what: str = FLAG) -> list[list[int]]:
    """Return the token ids of passages, with the special tokens that the tokenizer puts around plain text.

    Passages of one token are left out: nothing predicts it.

    Args:
        tokenizer: the model's.
        texts: the passages.
        what: the text as the user knows it, for errors.

    Raises:
        InputError: the tokenizer is an encoder–decoder's, or no passage has two tokens.
    """
    if chat.makes_pairs(tokenizer):
        raise InputError(f"{what} is for causal language models: an encoder–decoder predicts targets only; drop it")
    rows = [ids for ids in tokenizer(list(texts), verbose=False)["input_ids"] if len(ids) > 1]
    if not rows:
        raise InputError(f"{what}: no passage has more than one token: name another text")
    return rows


def windows(ids: Sequence[int], longest: int) -> list[list[int]]:
    """Return the pieces of a passage, of at most `longest` tokens.

    Each piece begins with the last token of the one before, so each token but the passage's first is predicted once.
    """
    return [list(ids[start : start + longest]) for start in range(0, len(ids) - 1, longest - 1)]


def passage_losses(
    model: Any, rows: Sequence[Sequence[int]], max_length: int | None, batch_size: int, before: Context | None = None
) -> np.ndarray:
    """Return [passages, 2]: the summed loss of each passage in nats, and how many tokens that counts.

    Args:
        model: a causal language model or a PeftModel.
        rows: of `passage_ids`.
        max_length: most tokens that the model takes, or None.
        batch_size: most pieces computed at once.
        before: a context that stands before each piece, or None.
    """
    longest = min(max_length or MAX_WINDOW, MAX_WINDOW)
    pieces = [(owner, piece) for owner, ids in enumerate(rows) for piece in windows(ids, longest)]
    placed = [before.before(piece, [(1, len(piece))]) if before else (piece, [(1, len(piece))]) for _, piece in pieces]
    losses = answer_losses(model, [ids for ids, _ in placed], [spans for _, spans in placed], batch_size)
    sums = np.zeros((len(rows), 2))
    np.add.at(sums, [owner for owner, _ in pieces], np.array(losses))
    return sums
