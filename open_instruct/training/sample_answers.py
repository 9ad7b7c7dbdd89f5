"""Held-out questions answered by the base model and by the tuned one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.generation import check_generation, greedy_answers
from open_instruct.errors import reason_of, warn
from open_instruct.training.load_data import Data

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class SampleQuestion:
    """A held-out conversation up to its last answer."""

    prompt: list[int]  # token ids
    text: str
    reference: str


def draw_questions(
    data: Data, tokenizer: PreTrainedTokenizerBase, num_questions: int, seed: int
) -> list[SampleQuestion]:
    """Draw held-out conversations by seed, and cut them before the assistant's last answer."""
    held_out = data.held_out_answers
    if held_out is None:
        return []
    indices = np.random.default_rng([seed, 0xA5]).permutation(len(held_out))[:num_questions]
    questions = [question_of(held_out[int(index)], tokenizer) for index in indices]
    return [replace(question, prompt=[*data.hard_prompt, *question.prompt]) for question in questions]


def question_of(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> SampleQuestion:
    """Cut an example {"input_ids", "spans"} before its last answer. Its labels are those of `Examples.by_answers`."""
    start, end = example["spans"][-2:]
    ids = example["input_ids"]
    reference = tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
    return SampleQuestion(ids[:start], tokenizer.decode(ids[:start], skip_special_tokens=True).strip(), reference)


@dataclass(frozen=True)
class SampleAnswers:
    """Held-out questions with the base model's answers, to be compared with the tuned model's.

    Args:
        questions: the questions.
        base: the base model's answers.
        max_length: positions of prompt and answer, the same for both models so that their answers compare; None:
            unlimited.
    """

    questions: list[SampleQuestion]
    base: list[str]
    max_length: int | None

    def compare(
        self, model: Any, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[dict[str, str]], dict[str, float] | None]:
        """Ask the tuned model.

        Returns:
            Question, reference and both answers of each; and the share of answers equal to the reference.
        """
        if not self.questions:
            return [], None
        tuned_answers = answer(model, tokenizer, self.questions, self.max_length)
        samples = [
            {"question": question.text, "reference": question.reference, "base": base, "tuned": tuned}
            for question, base, tuned in zip(self.questions, self.base, tuned_answers, strict=True)
        ]
        exact = {name: sum(s[name] == s["reference"] for s in samples) / len(samples) for name in ("base", "tuned")}
        return samples, {**exact, "number": len(samples)}

    def compare_or_warn(
        self, model: Any, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[list[dict[str, str]], dict[str, float] | None]:
        """Ask the tuned model as `compare` does; where that fails, nothing is returned, for the model is trained."""
        try:
            return self.compare(model, tokenizer)
        except Exception as error:
            warn(f"the sample answers are left out, as the tuned model could not answer ({reason_of(error)})")
            return [], None


def ask_base(
    base: Any, tokenizer: PreTrainedTokenizerBase, questions: list[SampleQuestion], max_length: int | None
) -> SampleAnswers:
    """Ask the base model, before the adapter is put on.

    Raises:
        InputError: its generation_config.json is wrong.
    """
    if questions:
        check_generation(base, f"model {base.name_or_path}")
    return SampleAnswers(questions, answer(base, tokenizer, questions, max_length), max_length)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: list[SampleQuestion], max_length: int | None
) -> list[str]:
    """Return greedy answers, at most twice as long as the longest reference."""
    if not questions:
        return []
    longest = max(len(tokenizer(q.reference, add_special_tokens=False)["input_ids"]) for q in questions)
    max_new_tokens = min(MAX_NEW_TOKENS, 2 * longest + 8)
    return greedy_answers(model, tokenizer, [question.prompt for question in questions], max_new_tokens, max_length)
