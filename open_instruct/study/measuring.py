"""Measurements of a trial: losses on held-out rows and on other text, and exact matches of answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from open_instruct.adapters.answer_metrics import exact_matches
from open_instruct.adapters.evaluation import chosen_questions
from open_instruct.adapters.forgetting import passage_ids, passage_losses
from open_instruct.adapters.generation import greedy_answers
from open_instruct.adapters.loaded import max_length
from open_instruct.adapters.scoring import answer_losses
from open_instruct.data import chat, dataset
from open_instruct.data.packing import behind_context
from open_instruct.data.questions import (
    Question,
    check_system,
    key_of,
    prompt_ids,
    with_calls_written,
    with_system,
)
from open_instruct.data.rendering import Rendering
from open_instruct.errors import InputError
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.study import other_text
from open_instruct.study.config import Study
from open_instruct.training.load_data import Data
from open_instruct.training.sample_answers import question_of

SCORING_BATCH_SIZE = 16  # rows
DRAW_SEED = 0  # of the questions of files: the same in every study, so that studies compare


def measure_trial(study: Study, model: Any, tokenizer: Any, data: Data) -> dict[str, Any]:
    """Measure a model as it is: on the rows for choosing, on the test rows, and on other text.

    Returns:
        {"study": {device, rows: [[summed loss, labelled tokens], …] of every held-out row, choosing: indices of rows,
        test: indices, asked: settings, answers and references: texts of each question, exact: [0 or 1, …] of them,
        other: [[summed loss, tokens], …], files: {name: {losses, answers, references}} of further questions},
        "data": fingerprints}.
    """
    held_out = data.held_out_answers  # by one rule, whatever a trial learns from
    assert held_out is not None
    examples = [behind_context({**held_out[i], "context": data.hard_prompt}, 0) for i in range(len(held_out))]
    choosing, test = split_rows(len(examples))
    longest = max(len(example["input_ids"]) for example in examples)
    with evaluating(model):
        rows = score(model, examples)
        answers, references = answer_questions(
            study, model, tokenizer, [examples[i] for i in test[: study.num_questions]]
        )
        other = other_losses(study, model, tokenizer, longest)
        asked = {name: file_questions(study, file, data.rendering, tokenizer) for name, file in study.files}
        files = {name: ask_file(study, model, tokenizer, rows, longest, name) for name, rows in asked.items()}
    device = next(model.parameters()).device.type
    exact = exact_matches(answers, references, study.answer_regex, study.normalise).tolist()
    figures = {
        **{"device": device, "rows": rows, "choosing": choosing, "test": test, "other": other},
        **{"asked": study.asked, "answers": answers, "references": references, "exact": exact, "files": files},
    }
    contents = {f"file {name}": questions_hash(rows) for name, rows in asked.items()}
    return {"study": figures, "data": {**data.fingerprints(), **contents}}


def file_questions(
    study: Study, file: str, rendering: Rendering | None, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """Return the questions of a file that every trial answers: as many as of the test rows, drawn once for all.

    Args:
        study: the study.
        file: questions with answers.
        rendering: how training makes conversations of columns; None: rows have a known form.
        tokenizer: with its chat template.

    Raises:
        InputError: the file can't be used, or the system message would stand nowhere.
    """
    form = replace(rendering, all_templates=False) if rendering else None
    rows = chosen_questions(file, study.num_questions, DRAW_SEED, form=form)
    if study.system is not None:
        check_system(tokenizer, rows, study.system, "report.system")
        rows = [replace(question, messages=with_system(question.messages, study.system)) for question in rows]
    return with_calls_written(rows, tokenizer)


def questions_hash(rows: Sequence[Question]) -> str:
    """Return a hash of questions and references: trials with another one were asked otherwise."""
    content = json.dumps([[key_of(question.messages), question.reference] for question in rows])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def ask_file(
    study: Study, model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], longest: int, name: str
) -> dict[str, Any]:
    """Answer a file's questions greedily, and measure the losses of its own answers.

    Args:
        study: the study.
        model: as it is.
        tokenizer: with its chat template.
        rows: the questions.
        longest: conversations are cut to so many tokens for their losses, in all trials alike.
        name: of the file, for errors.

    Returns:
        {losses: [[summed loss, labelled tokens], …], answers, references}.

    Raises:
        InputError: nothing is labelled within `longest` tokens.
    """
    ids, spans = chat.tokenize(tokenizer, [question.answered for question in rows], longest)
    losses = [[loss, count] for loss, count in answer_losses(model, ids, spans, SCORING_BATCH_SIZE)]
    if not sum(count for _, count in losses):
        raise InputError(
            f"report.files {name}: no answer begins within {longest} tokens, the length of the longest held-out row: "
            "give shorter rows"
        )
    prompts = [prompt_ids(tokenizer, question.messages) for question in rows]
    length = max_length(model.config, num_virtual_tokens(model))
    answers = greedy_answers(model, tokenizer, prompts, study.max_new_tokens, length)
    return {"losses": losses, "answers": answers, "references": [str(question.reference) for question in rows]}


def answer_questions(
    study: Study, model: Any, tokenizer: Any, examples: list[dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """Answer the last question of each example greedily; return the answers, and those of the examples."""
    if not examples:
        return [], []
    questions = [question_of(example, tokenizer) for example in examples]
    length = max_length(model.config, num_virtual_tokens(model))
    prompts, references = [q.prompt for q in questions], [q.reference for q in questions]
    return greedy_answers(model, tokenizer, prompts, study.max_new_tokens, length), references


def num_virtual_tokens(model: Any) -> int:
    """Return the number of virtual tokens that a model's adapter puts before a row; 0 without a soft prompt."""
    config = getattr(model, "active_peft_config", None)
    return getattr(config, "num_virtual_tokens", None) or 0


def score(model: Any, examples: list[dict[str, Any]]) -> list[list[float]]:
    """Return [summed loss, labelled tokens] of each example, by PEFT's own forward pass."""
    spans = [list(zip(example["spans"][::2], example["spans"][1::2], strict=True)) for example in examples]
    ids = [example["input_ids"] for example in examples]
    return [[loss, num_labels] for loss, num_labels in answer_losses(model, ids, spans, SCORING_BATCH_SIZE)]


def split_rows(num_rows: int) -> tuple[list[int], list[int]]:
    """Return the held-out rows that choose the parameters, and those for the report: the same halves in every trial."""
    shuffled = np.random.default_rng(0x7E57).permutation(num_rows)
    return sorted(shuffled[: num_rows // 2].tolist()), sorted(shuffled[num_rows // 2 :].tolist())


def other_losses(study: Study, model: Any, tokenizer: Any, longest: int) -> list[list[float]]:
    """Return [summed loss, tokens] of each passage or conversation that measures forgetting.

    All tokens of plain text count but the first of a passage; in conversations the answers count. Passages are computed
    in pieces of at most `longest` tokens, conversations are cut there.
    """
    if study.other_text is None:
        return []
    if other_text.is_plain(study.other_text):
        rows = passage_ids(
            tokenizer, other_text.first_passages(study.other_text), f"report.other_text {study.other_text}"
        )
        return [list(row) for row in passage_losses(model, rows, max(2, longest), SCORING_BATCH_SIZE).tolist()]
    examples = dataset.build(other_text.other_conversations(study.other_text), tokenizer, longest, "", None)
    return score(model, [examples[i] for i in range(min(other_text.MAX_ROWS, len(examples)))])
