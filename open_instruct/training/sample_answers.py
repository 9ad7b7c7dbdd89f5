"""Held-out questions answered by the base model and by the tuned one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.generation import greedy_answers
from open_instruct.data.dataset import Examples

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Question:
    """A held-out conversation up to its last answer."""

    prompt: list[int]
    text: str
    reference: str


def questions(held_out: Examples | None, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Question]:
    """Up to `count` held-out conversations, drawn by seed, cut before the assistant's last answer."""
    if held_out is None:
        return []
    chosen = np.random.default_rng([seed, 0xA5]).permutation(len(held_out))[:count]
    found = []
    for index in chosen:
        example = held_out[int(index)]
        start, end = example["spans"][-2:]
        ids = example["input_ids"]
        prompt, reference = ids[:start], tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
        found.append(Question(prompt, tokenizer.decode(prompt, skip_special_tokens=True).strip(), reference))
    return found


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Question], max_length: int | None) -> list[str]:
    """Greedy answers, as long as twice the longest reference at most. `max_length` is the room of prompt and answer."""
    if not asked:
        return []
    longest = max(len(tokenizer(question.reference, add_special_tokens=False)["input_ids"]) for question in asked)
    room = min(MAX_NEW_TOKENS, 2 * longest + 8)
    return greedy_answers(model, tokenizer, [question.prompt for question in asked], room, max_length)


@dataclass(frozen=True)
class Examination:
    """Held-out questions, what the base answers, and the room of prompt and answer: the same for both models."""

    asked: list[Question]
    base: list[str]
    room: int | None

    def of(
        self, model: Any, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[dict[str, str]], dict[str, float] | None]:
        """Question, reference and both answers of each; and the share of answers equal to the reference."""
        if not self.asked:
            return [], None
        tuned = answer(model, tokenizer, self.asked, self.room)
        samples = [
            {"question": q.text, "reference": q.reference, "base": b, "tuned": t}
            for q, b, t in zip(self.asked, self.base, tuned, strict=True)
        ]
        exact = {name: sum(s[name] == s["reference"] for s in samples) / len(samples) for name in ("base", "tuned")}
        return samples, {**exact, "number": len(samples)}


def examine(base: Any, tokenizer: PreTrainedTokenizerBase, asked: list[Question], room: int | None) -> Examination:
    """Ask the base."""
    return Examination(asked, answer(base, tokenizer, asked, room), room)
