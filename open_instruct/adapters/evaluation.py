"""A base model and adapters on it measured side by side: loss of given answers, and figures of generated ones."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_instruct.adapters import answer_metrics, full_models, loaded, writing
from open_instruct.adapters.answer_metrics import METRICS, Statistic
from open_instruct.adapters.evaluation_figures import IN_CONTEXT, answer_statistics, loss_by_source, loss_statistics
from open_instruct.adapters.folders import BASE, parse_adapters
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.question_forms import form_of_questions
from open_instruct.adapters.served import Served, load
from open_instruct.data import chat, questions
from open_instruct.data.context import Context, context_of, read_context
from open_instruct.data.questions import Question
from open_instruct.data.rendering import Rendering
from open_instruct.data.tools import has_calls
from open_instruct.errors import InputError
from open_instruct.model import loading
from open_instruct.model.backends import head_shape

TIMED = 10  # questions whose first token is timed


@dataclass(frozen=True)
class Asked:
    """What every model is asked, and how its answers are counted; see `evaluate`."""

    rows: Sequence[Question]
    names: Sequence[str]
    answer_regex: str | None
    normaliser: str
    max_new_tokens: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """What one model reached."""

    figures: dict[str, dict[str, Any]]  # with what was drawn for their intervals
    answers: list[str] | None  # None: no figure wanted answers
    sums: np.ndarray | None  # [rows, 2]: summed loss and labelled tokens; None: no figure wanted losses
    num_truncated: int
    num_unlabelled: int
    num_unanswered: int


def evaluate(
    file: str,
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
    **options: Any,
) -> dict[str, Any]:
    """Measure base and adapters on a file; the flags of `evaluate_peft.py --help` say more of the arguments.

    Args:
        file: questions with answers.
        adapter: an adapter in a form that `load` accepts.
        model_name_or_path: base model; unset: the one that the adapters name.
        names: some of `METRICS`.
        answer_regex: finds the part of an answer that counts.
        normaliser: one of `NORMALISERS`, for exact match.
        max_samples: number of rows, drawn by seed; None: all.
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
        options: further arguments of `load`.

    Returns:
        Content of evaluation.json.

    Raises:
        InputError: wrong input.
    """
    folders = parse_adapters([adapter] if isinstance(adapter, str) else adapter)
    full = full_models.parse_models(model, [folder.name for folder in folders])
    form = form_of_questions(folders, columns, template, shots, shots_file, seed, answered=True)
    rows = chosen_questions(file, max_samples, seed, bad_rows, form)
    if answer_regex and "exact_match" in names:  # checked before the model is loaded; what a call says is known then
        references = [str(question.reference) for question in rows if not has_calls(question.turn or {})]
        answer_metrics.exact_matches(references, references, answer_regex, normaliser)
    text = read_context(context, "--context") if context else None
    served = load(adapter, model_name_or_path, **options)
    before = context_of(text, served.tokenizer) if text else None
    if before and served.hard_prompts:
        raise InputError("--context is for adapters without a hard prompt, and these were trained behind one: drop it")
    rows = questions.with_calls_written(rows, served.tokenizer)
    asked = Asked(rows, names, answer_regex, normaliser, max_new_tokens, batch_size, seed)
    result = measure(served, asked, before, full, **options)
    return result | {"questions": form and form.describe()}


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
    served: Served, asked: Asked, context: Context | None = None, full: Mapping[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """Return all figures of base, base behind a context, adapters, and full models; see `evaluate`.

    Args:
        served: base and adapters.
        asked: questions and figures.
        context: what the base is measured behind as well, or None.
        full: folders or repositories of full models, by name.
        options: further arguments of `load`, for them.

    Raises:
        InputError: the context leaves no room, or no row has a label.
    """
    rows, full = asked.rows, dict(full or {})
    hard_prompt = common_hard_prompt(served)
    models: dict[str, Context | None] = {BASE: hard_prompt, **({IN_CONTEXT: context} if context else {})}
    models |= {name: served.hard_prompts.get(name) for name in served.names}
    max_length = max_row_length(served, context)  # the same for all, so that all score the same tokens
    configs = [
        loading.load_config(source, trust_remote_code=bool(options.get("trust_remote_code")))
        for source in full.values()
    ]
    bounds = [max_length, *(loaded.max_length(config) for config in configs)]
    max_length = min((bound for bound in bounds if bound is not None), default=None)
    measured = {name: measure_one(served, name, before, asked, max_length, context) for name, before in models.items()}
    labelled = labelled_tokens(served, rows) if full else []
    for name, source in full.items():
        alone = load(None, source, **options)
        if "loss" in asked.names:
            full_models.check_same_tokens(name, labelled_tokens(alone, rows), labelled)
        measured[name] = measure_one(alone, BASE, None, asked, max_length)
    figures = {name: one.figures for name, one in measured.items()}
    differences = {name: answer_metrics.differences(figures[name], figures[BASE]) for name in measured if name != BASE}
    for by_metric in figures.values():
        for figure in by_metric.values():
            del figure["drawn"]
    sums = {name: one.sums for name, one in measured.items() if one.sums is not None}
    answers = {name: one.answers for name, one in measured.items() if one.answers is not None}
    last = list(measured.values())[-1]
    references = [str(question.reference) for question in rows]
    return {
        "model": served.model_name,
        "adapters": {name: str(folder.path) for name, folder in served.adapters.folders.items()},
        "models": full,
        "rows": len(rows),
        "truncated": last.num_truncated,
        "unlabelled": last.num_unlabelled,
        "unanswered": last.num_unanswered,
        "answer_regex": asked.answer_regex,
        "normaliser": asked.normaliser,
        "writing": dict(Counter(writing.writing_of(reference) for reference in references)),
        "tokens_before": tokens_before(served, context),
        "bytes_before": bytes_before(served, context),
        "hard_prompt_tokens": {name: len(before.ids) for name, before in models.items() if before and not context},
        "first_token_seconds": first_token_seconds(served, rows, models) if context else {},
        "figures": figures,
        "loss_by_source": loss_by_source(sums, [question.named_source for question in rows], asked.seed),
        "differences_from_base": differences,
        "examples": [
            {"question": question.text, "reference": question.reference, **{name: answers[name][i] for name in answers}}
            for i, question in enumerate(rows[:20])
        ],
    }


def labelled_tokens(served: Served, rows: Sequence[Question]) -> list[list[int]]:
    """Return the tokens of each row that the loss is a mean over."""
    ids, spans = chat.tokenize(served.tokenizer, [question.answered for question in rows], 1 << 30)
    return [
        [token for start, end in of_row for token in row[start:end]] for row, of_row in zip(ids, spans, strict=True)
    ]


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
    rows, figures, sums, answers = asked.rows, {}, None, None
    num_truncated = num_unlabelled = num_unanswered = 0
    if "loss" in asked.names:
        losses, sums, num_truncated = loss_statistics(served, name, rows, max_length, asked.batch_size, context, before)
        num_unlabelled = int((sums[:, 1] == 0).sum())
        num_labelled = len(rows) - num_unlabelled
        draws = answer_metrics.resamples(num_labelled, asked.seed)
        figures = answer_metrics.figures(losses, num_labelled, draws)
    statistics: dict[str, Statistic] = {}
    if set(asked.names) - {"loss"}:
        prompts = [questions.prompt_ids(served.tokenizer, question.messages) for question in rows]
        num_unanswered = sum(len(prompt) >= max_length for prompt in prompts) if max_length else 0
        if before and name not in served.names:  # an adapter's own is put before its prompts where it answers
            prompts = [before.before(prompt)[0] for prompt in prompts]
        sampling, adapter = Sampling(max_new_tokens=asked.max_new_tokens), BASE if name == IN_CONTEXT else name
        answer_of = dict(served.stream(prompts, adapter, sampling, asked.batch_size))
        answers = [answer_of[i][0] for i in range(len(rows))]
        references = [str(question.reference) for question in rows]
        statistics = answer_statistics(answers, references, asked.names, asked.answer_regex, asked.normaliser)
    draws = answer_metrics.resamples(len(rows), asked.seed)
    figures = figures | answer_metrics.figures(statistics, len(rows), draws)
    return Measured(figures, answers, sums, num_truncated, num_unlabelled, num_unanswered)


def common_hard_prompt(served: Served) -> Context | None:
    """Return the hard prompt that all adapters were trained behind, as the base is measured behind it, too; or None."""
    prompts = [served.hard_prompts.get(name) for name in served.names]
    return prompts[0] if prompts and all(prompt == prompts[0] for prompt in prompts) else None


def max_row_length(served: Served, context: Context | None) -> int | None:
    """Return how many tokens a row may have with all models; None: unlimited.

    Raises:
        InputError: the context leaves none.
    """
    most = served.max_length(BASE, *served.names)
    whole = served.max_length(BASE)
    if context is None or most is None or whole is None:
        return most
    left = whole - len(context.ids) + context.num_shared
    if left < 2:
        raise InputError(
            f"--context has {len(context.ids):,} tokens, and the model {whole:,} positions: shorten the text"
        )
    return min(most, left)


def tokens_before(served: Served, context: Context | None) -> dict[str, int]:
    """Return how many positions each model computes or keeps before a conversation, if a context is compared."""
    if context is None:
        return {}
    virtual = {name: folder.num_virtual_tokens for name, folder in served.adapters.folders.items()}
    return {BASE: 0, IN_CONTEXT: len(context.ids) - context.num_shared, **virtual}


def bytes_before(served: Served, context: Context | None) -> dict[str, int]:
    """Return the bytes of keys and values that a request keeps before its conversation; empty where that is unknown."""
    base = served.adapters.base
    shape, layers = head_shape(base.config), getattr(base.config.get_text_config(), "num_hidden_layers", None)
    if shape is None or not layers:
        return {}
    each = 2 * layers * shape.num_key_heads * shape.size * base.dtype.itemsize
    return {name: each * count for name, count in tokens_before(served, context).items()}


def first_token_seconds(
    served: Served, rows: Sequence[Question], models: Mapping[str, Context | None]
) -> dict[str, float]:
    """Return the median time from a question to the first token of its answer, one request at a time.

    Models take turns, so that a machine's other work disturbs all of them alike.

    Args:
        served: base and adapters.
        rows: the questions, of which the first few are asked.
        models: the context that stands before each model's conversations, or None.
    """
    one, times = Sampling(max_new_tokens=1), defaultdict(list)
    for question in [rows[0], *rows[:TIMED]]:  # the first one warms up
        prompt = questions.prompt_ids(served.tokenizer, question.messages)
        for name, before in models.items():
            ids = before.before(prompt)[0] if before else prompt
            start = time.perf_counter()
            list(served.stream([ids], BASE if before else name, one))
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[1:])) for name, values in times.items()}
