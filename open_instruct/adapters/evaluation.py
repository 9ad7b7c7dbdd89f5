"""A base model and adapters on it measured side by side: loss of given answers, and figures of generated ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from open_instruct.adapters import answer_metrics, forgetting, full_models, loaded, writing
from open_instruct.adapters.answer_metrics import METRICS, Statistic
from open_instruct.adapters.comparable import check_comparable
from open_instruct.adapters.context_costs import (
    bytes_before,
    common_hard_prompt,
    first_token_seconds,
    max_row_length,
    tokens_before,
)
from open_instruct.adapters.evaluation_figures import (
    IN_CONTEXT,
    answer_statistics,
    loss_by_source,
    loss_statistics,
    per_token,
)
from open_instruct.adapters.folders import BASE, parse_adapters
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.named_files import named_files
from open_instruct.adapters.question_forms import form_of_questions
from open_instruct.adapters.served import Served, Unloaded, prepare_served
from open_instruct.adapters.similarity import Similarity, load_similarity
from open_instruct.data import questions
from open_instruct.data.context import Context, context_of, read_context
from open_instruct.data.questions import Question, with_system
from open_instruct.data.rendering import Rendering
from open_instruct.data.tools import has_calls
from open_instruct.errors import InputError
from open_instruct.model import loading


@dataclass(frozen=True)
class Asked:
    """What every model is asked, and how its answers are counted; see `evaluate`."""

    rows: Sequence[Question]
    files: Mapping[str, np.ndarray]  # indices of each file's rows, by its name
    passages: Sequence[Sequence[int]]  # tokens of the other text; empty: none is measured
    names: Sequence[str]
    answer_regex: str | None
    normaliser: str
    similarity: Similarity | None
    max_new_tokens: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """What one model reached; statistics are of indices of rows."""

    losses: dict[str, Statistic]  # of rows that have a labelled token
    statistics: dict[str, Statistic]  # of the answers
    answers: list[str] | None  # None: no figure wanted answers
    sums: np.ndarray | None  # [rows, 2]: summed loss and labelled tokens; None: no figure wanted losses
    other_sums: np.ndarray | None  # [passages, 2]: summed loss and tokens of the other text
    num_truncated: int
    num_unanswered: int

    def figures(self, rows: np.ndarray, seed: int, with_other_text: bool = False) -> dict[str, dict[str, Any]]:
        """Return the figures of some rows, with what was drawn for their intervals.

        Args:
            rows: their indices; without a labelled token among them, they have no loss.
            seed: seed of the bootstrap.
            with_other_text: add the figures of the other text, which belongs to no row.
        """
        parts = [(self.statistics, rows)]
        if self.sums is not None:
            parts.insert(0, (self.losses, rows[self.sums[rows, 1] > 0]))
        if with_other_text and self.other_sums is not None:
            other = per_token(self.other_sums, f"{forgetting.NAME}_")
            parts.append((other, np.arange(len(self.other_sums))))
        figures: dict[str, dict[str, Any]] = {}
        for statistics, chosen in parts:
            if len(chosen):
                figures |= answer_metrics.figures(statistics, chosen, answer_metrics.resamples(len(chosen), seed))
        return figures


def evaluate(
    file: Sequence[str] | str,
    adapter: Sequence[str] | str | None = None,
    model_name_or_path: str | None = None,
    names: Sequence[str] = METRICS,
    answer_regex: str | None = None,
    normaliser: str = "none",
    max_samples: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 42,
    bad_rows: str = "error",
    context: str | None = None,
    model: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    template: str | None = None,
    shots: int | None = None,
    shots_file: str | None = None,
    system: str | None = None,
    other_text: str | None = None,
    similarity_model: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure base and adapters on files; the flags of `evaluate_peft.py --help` say more of the arguments.

    Args:
        file: questions with answers; several files, each as FILE or NAME=FILE, are measured one by one and together.
        adapter: an adapter in a form that `load` accepts.
        model_name_or_path: base model; unset: the one that the adapters name.
        names: some of `METRICS`.
        answer_regex: finds the part of an answer that counts.
        normaliser: one of `NORMALISERS`, for exact match.
        max_samples: number of rows of each file, and of passages of the other text, drawn by seed; None: all.
        max_new_tokens: most tokens of an answer.
        batch_size: most rows computed at once.
        seed: seed of the choice of rows and of the bootstrap.
        bad_rows: "error", or "skip": leave out rows that can't be used.
        context: text file that the base is measured behind as well; None: it is not.
        model: full models to measure as well, NAME=FOLDER.
        columns: columns of the questions; this and the next three: see `question_forms.form_of_questions`.
        template: file of the questions' templates.
        shots: exemplars before each question.
        shots_file: rows from which they are drawn.
        system: system message of conversations that have none; None: leave them so.
        other_text: plain text on which every model's loss is measured as well, all tokens counted.
        similarity_model: model of sentence-transformers by which answers are compared with references; None: none.
        options: further arguments of `load`.

    Returns:
        Content of evaluation.json.

    Raises:
        InputError: wrong input.
    """
    folders = parse_adapters([adapter] if isinstance(adapter, str) else adapter)
    full = full_models.parse_models(model, [folder.name for folder in folders])
    form = form_of_questions(folders, columns, template, shots, shots_file, seed, answered=True)
    sources = named_files([file] if isinstance(file, str) else file, "--file")
    by_file = {name: chosen_questions(source, max_samples, seed, bad_rows, form) for name, source in sources.items()}
    rows = [question for of_file in by_file.values() for question in of_file]
    if answer_regex and "exact_match" in names:  # checked before the model is loaded; what a call says is known then
        references = [str(question.reference) for question in rows if not has_calls(question.turn or {})]
        answer_metrics.exact_matches(references, references, answer_regex, normaliser)
    text = read_context(context, "--context") if context else None
    passages = forgetting.chosen_passages(other_text, max_samples, seed) if other_text else []
    similarity = load_similarity(similarity_model) if similarity_model else None
    base = prepare_served(adapter, model_name_or_path, **options)
    alone = {name: prepare_served(None, source, **options) for name, source in full.items()}
    if system is not None:
        for model_or_base in (base, *alone.values()):
            questions.check_system(model_or_base.tokenizer, rows, system)
        rows = [replace(question, messages=with_system(question.messages, system)) for question in rows]
    rows = questions.with_calls_written(rows, base.tokenizer)
    ids = forgetting.passage_ids(base.tokenizer, passages) if passages else []
    for name, model_alone in alone.items():
        check_comparable(name, model_alone, base, rows if "loss" in names else [], passages)
    ends = np.cumsum([len(of_file) for of_file in by_file.values()])
    files = dict(zip(by_file, np.split(np.arange(len(rows)), ends[:-1]), strict=True))
    asked = Asked(rows, files, ids, names, answer_regex, normaliser, similarity, max_new_tokens, batch_size, seed)
    served = base.load()
    before = context_of(text, served.tokenizer) if text else None
    if before and served.hard_prompts:
        raise InputError("--context is for adapters without a hard prompt, and these were trained behind one: drop it")
    result = measure(served, asked, before, alone)
    said = {"file": other_text, "passages": len(ids), "tokens": sum(len(row) - 1 for row in ids)} if ids else None
    return result | {
        "questions": form and form.describe(),
        "files": sources,
        "system": system,
        "other_text": said,
        "similarity_model": similarity_model,
    }


def chosen_questions(
    file: str, max_samples: int | None, seed: int, bad_rows: str = "error", form: Rendering | None = None
) -> list[Question]:
    """Return the questions of a file with their answers, in the file's order.

    Raises:
        InputError: there is none, or one can't be used or has no answer, and `bad_rows` is not "skip".
    """
    rows = questions.read_questions(file, bad_rows, answered=True, rendering=form)
    return [rows[i] for i in answer_metrics.chosen_rows(len(rows), max_samples, seed)]


def measure(
    served: Served, asked: Asked, context: Context | None = None, full: Mapping[str, Unloaded] | None = None
) -> dict[str, Any]:
    """Return all figures of base, base behind a context, adapters, and full models; see `evaluate`.

    Args:
        served: base and adapters.
        asked: questions and figures.
        context: what the base is measured behind as well, or None.
        full: full models, by name; each is loaded alone.

    Raises:
        InputError: the context leaves no room, or no row has a label.
    """
    rows, full = asked.rows, dict(full or {})
    hard_prompt = common_hard_prompt(served)
    models: dict[str, Context | None] = {BASE: hard_prompt, **({IN_CONTEXT: context} if context else {})}
    models |= {name: served.hard_prompts.get(name) for name in served.names}
    max_length = max_row_length(served, context)  # the same for all, so that all score the same tokens
    configs = [loading.load_config(one.name, trust_remote_code=one.trust_remote_code) for one in full.values()]
    bounds = [max_length, *(loaded.max_length(config) for config in configs)]
    max_length = min((bound for bound in bounds if bound is not None), default=None)
    measured = {name: measure_one(served, name, before, asked, max_length, context) for name, before in models.items()}
    for name, unloaded in full.items():
        measured[name] = measure_one(unloaded.load(), BASE, None, asked, max_length)
    total = compared(measured, np.arange(len(rows)), asked.seed, with_other_text=True)
    several = asked.files if len(asked.files) > 1 else {}
    by_file = {name: {"rows": len(of), **compared(measured, of, asked.seed)} for name, of in several.items()}
    sums = {name: one.sums for name, one in measured.items() if one.sums is not None}
    answers = {name: one.answers for name, one in measured.items() if one.answers is not None}
    last = list(measured.values())[-1]
    references = [str(question.reference) for question in rows]
    return {
        "model": served.model_name,
        "adapters": {name: str(folder.path) for name, folder in served.adapters.folders.items()},
        "models": {name: one.name for name, one in full.items()},
        "rows": len(rows),
        "truncated": last.num_truncated,
        "unlabelled": int((last.sums[:, 1] == 0).sum()) if last.sums is not None else 0,
        "unanswered": last.num_unanswered,
        "answer_regex": asked.answer_regex,
        "normaliser": asked.normaliser,
        "writing": dict(Counter(writing.writing_of(reference) for reference in references)),
        "tokens_before": tokens_before(served, context),
        "bytes_before": bytes_before(served, context),
        "hard_prompt_tokens": {name: len(before.ids) for name, before in models.items() if before and not context},
        "first_token_seconds": first_token_seconds(served, rows, models) if context else {},
        "figures": total["figures"],
        "by_file": by_file,
        "loss_by_source": loss_by_source(sums, [question.named_source for question in rows], asked.seed),
        "differences_from_base": total["differences_from_base"],
        "examples": [
            {"question": question.text, "reference": question.reference, **{name: answers[name][i] for name in answers}}
            for i, question in enumerate(rows[:20])
        ],
    }


def compared(
    measured: Mapping[str, Measured], rows: np.ndarray, seed: int, with_other_text: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the figures of all models on some rows, and each one's differences from the base; see `Measured.figures`.

    Returns:
        {"figures": {model: {figure: value and interval}}, "differences_from_base": {model: the same}}.
    """
    figures = {name: one.figures(rows, seed, with_other_text) for name, one in measured.items()}
    differences = {name: answer_metrics.differences(figures[name], figures[BASE]) for name in measured if name != BASE}
    for by_metric in figures.values():
        for figure in by_metric.values():
            del figure["drawn"]
    return {"figures": figures, "differences_from_base": differences}


def measure_one(
    served: Served,
    name: str,
    before: Context | None,
    asked: Asked,
    max_length: int | None,
    context: Context | None = None,
) -> Measured:
    """Measure one model.

    Args:
        served: base and adapters.
        name: the model: "base", "base + context", or an adapter.
        before: what stands before its rows, or None.
        asked: questions and figures.
        max_length: most tokens of a row that are used.
        context: where given, the divergence from the base behind it is measured, too.

    Raises:
        InputError: nothing is labelled within `max_length` tokens.
    """
    rows, sums, answers = asked.rows, None, None
    losses: dict[str, Statistic] = {}
    statistics: dict[str, Statistic] = {}
    num_truncated = num_unanswered = 0
    if "loss" in asked.names:
        losses, sums, num_truncated = loss_statistics(served, name, rows, max_length, asked.batch_size, context, before)
    adapter = BASE if name == IN_CONTEXT else name
    other_sums = None
    if asked.passages:
        placed = before if name == IN_CONTEXT else None  # hard prompts belong to conversations
        model = served.adapters.use(adapter)
        other_sums = forgetting.passage_losses(model, asked.passages, max_length, asked.batch_size, placed)
    if asked.similarity or set(asked.names) - {"loss"}:
        prompts = [questions.prompt_ids(served.tokenizer, question.messages) for question in rows]
        num_unanswered = sum(len(prompt) >= max_length for prompt in prompts) if max_length else 0
        if before and name not in served.names:  # an adapter's own is put before its prompts where it answers
            prompts = [before.before(prompt)[0] for prompt in prompts]
        sampling = Sampling(max_new_tokens=asked.max_new_tokens)
        answer_of = dict(served.stream(prompts, adapter, sampling, asked.batch_size))
        answers = [answer_of[i][0] for i in range(len(rows))]
        references = [str(question.reference) for question in rows]
        statistics = answer_statistics(
            answers, references, asked.names, asked.answer_regex, asked.normaliser, asked.similarity
        )
    return Measured(losses, statistics, answers, sums, other_sums, num_truncated, num_unanswered)
