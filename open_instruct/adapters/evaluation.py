"""A base model and adapters on it measured side by side: loss of given answers, and figures of generated ones."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from open_instruct.adapters import answer_metrics, writing
from open_instruct.adapters.answer_metrics import METRICS, Statistic, mean_of
from open_instruct.adapters.folders import BASE, parse_adapters
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.question_forms import form_of_questions
from open_instruct.adapters.scoring import answer_losses, divergences
from open_instruct.adapters.served import Served, load
from open_instruct.data import chat, questions
from open_instruct.data.context import Context, context_of, read_context
from open_instruct.data.questions import Question
from open_instruct.data.rendering import Rendering
from open_instruct.data.sources import MAX_MEASURED, NO_SOURCE
from open_instruct.errors import InputError
from open_instruct.model.backends import head_shape

IN_CONTEXT = "base + context"
TIMED = 10  # questions whose first token is timed


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
    form = form_of_questions(folders, columns, template, shots, shots_file, seed, answered=True)
    rows = chosen_questions(file, max_samples, seed, bad_rows, form)
    if answer_regex and "exact_match" in names:  # checked before the model is loaded
        references = [str(question.reference) for question in rows]
        answer_metrics.exact_matches(references, references, answer_regex, normaliser)
    text = read_context(context, "--context") if context else None
    served = load(adapter, model_name_or_path, **options)
    before = context_of(text, served.tokenizer) if text else None
    if before and served.hard_prompts:
        raise InputError("--context is for adapters without a hard prompt, and these were trained behind one: drop it")
    result = measure(served, rows, names, answer_regex, normaliser, max_new_tokens, batch_size, seed, before)
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
    served: Served,
    rows: Sequence[Question],
    names: Sequence[str],
    answer_regex: str | None,
    normaliser: str,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    context: Context | None = None,
) -> dict[str, Any]:
    """Return all figures of base, base behind a context, and adapters; see `evaluate`.

    Raises:
        InputError: the context leaves no room, or no row has a label.
    """
    draws = answer_metrics.resamples(len(rows), seed)
    references = [str(question.reference) for question in rows]
    hard_prompt = common_hard_prompt(served)
    models: dict[str, Context | None] = {BASE: hard_prompt, **({IN_CONTEXT: context} if context else {})}
    models |= {name: served.hard_prompts.get(name) for name in served.names}
    max_length = max_row_length(served, context)  # the same for all, so that all score the same tokens
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    answers, sums = {}, {}
    num_truncated = num_unlabelled = num_unanswered = 0
    for name, before in models.items():
        statistics: dict[str, Statistic] = {}
        figures[name] = {}
        if "loss" in names:
            losses, sums[name], num_truncated = loss_statistics(
                served, name, rows, max_length, batch_size, context, before
            )
            num_unlabelled = int((sums[name][:, 1] == 0).sum())
            num_labelled = len(rows) - num_unlabelled
            figures[name] = answer_metrics.figures(losses, num_labelled, answer_metrics.resamples(num_labelled, seed))
        if set(names) - {"loss"}:
            prompts = [questions.prompt_ids(served.tokenizer, question.messages) for question in rows]
            num_unanswered = sum(len(prompt) >= max_length for prompt in prompts) if max_length else 0
            if before and name not in served.names:  # an adapter's own is put before its prompts where it answers
                prompts = [before.before(prompt)[0] for prompt in prompts]
            sampling, adapter = Sampling(max_new_tokens=max_new_tokens), BASE if name == IN_CONTEXT else name
            answer_of = dict(served.stream(prompts, adapter, sampling, batch_size))
            answers[name] = [answer_of[i][0] for i in range(len(rows))]
            statistics |= answer_statistics(answers[name], references, names, answer_regex, normaliser)
        figures[name] |= answer_metrics.figures(statistics, len(rows), draws)
    differences = {name: answer_metrics.differences(figures[name], figures[BASE]) for name in models if name != BASE}
    for by_metric in figures.values():
        for figure in by_metric.values():
            del figure["drawn"]
    return {
        "model": served.model_name,
        "adapters": {name: str(folder.path) for name, folder in served.adapters.folders.items()},
        "rows": len(rows),
        "truncated": num_truncated,
        "unlabelled": num_unlabelled,
        "unanswered": num_unanswered,
        "answer_regex": answer_regex,
        "normaliser": normaliser,
        "writing": dict(Counter(writing.writing_of(reference) for reference in references)),
        "tokens_before": tokens_before(served, context),
        "bytes_before": bytes_before(served, context),
        "hard_prompt_tokens": {name: len(before.ids) for name, before in models.items() if before and not context},
        "first_token_seconds": first_token_seconds(served, rows, models) if context else {},
        "figures": figures,
        "loss_by_source": loss_by_source(sums, [question.named_source for question in rows], seed),
        "differences_from_base": differences,
        "examples": [
            {"question": question.text, "reference": question.reference, **{name: answers[name][i] for name in answers}}
            for i, question in enumerate(rows[:20])
        ],
    }


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


def loss_statistics(
    served: Served,
    name: str,
    rows: Sequence[Question],
    max_length: int | None,
    batch_size: int,
    context: Context | None = None,
    before: Context | None = None,
) -> tuple[dict[str, Statistic], np.ndarray, int]:
    """Return loss and perplexity per labelled token, as statistics of the rows that have a labelled token.

    All of the assistant's turns are labelled, as in training.

    Args:
        served: base and adapters.
        name: the model.
        rows: the questions, with answers.
        max_length: most tokens of a row that are used.
        batch_size: most rows computed at once.
        context: where given, the divergence from the base behind it is measured, too.
        before: what stands before the rows: a hard prompt, or the context if the model is the base behind it.

    Returns:
        The statistics; of each row, summed loss and labelled tokens [rows, 2]; how many rows were cut to `max_length`
        tokens.

    Raises:
        InputError: nothing is labelled within `max_length` tokens.
    """
    messages = [[*question.messages, {"role": "assistant", "content": question.reference}] for question in rows]
    ids, spans = chat.tokenize(served.tokenizer, messages, max_length or 1 << 30)
    if before:
        behind = [before.before(row, row_spans) for row, row_spans in zip(ids, spans, strict=True)]
        model = served.adapters.use(BASE if name == IN_CONTEXT else name)
        losses = answer_losses(model, [row for row, _ in behind], [moved for _, moved in behind], batch_size)
    else:
        losses = answer_losses(served.adapters.use(name), ids, spans, batch_size)
    sums = np.array(losses)  # [rows, 2]: loss, labelled tokens
    if not sums[:, 1].sum():
        raise InputError(
            f"no row has a labelled token within the model's maximum of {max_length} tokens: give shorter rows"
        )

    labelled = sums[sums[:, 1] > 0]

    def loss(indices: np.ndarray) -> float:
        total = labelled[indices].sum(0)
        return float(total[0] / total[1])

    def perplexity(indices: np.ndarray) -> float:
        return math.exp(min(loss(indices), 700.0))  # above, float64 overflows

    statistics: dict[str, Statistic] = {"loss": loss, "perplexity": perplexity}
    if context:
        if before:
            apart = np.zeros_like(labelled)
        else:
            wholes = [context.before(row)[0] for row in ids]
            all_apart = np.array(divergences(served.adapters.use, name, ids, wholes, spans))
            apart = all_apart[sums[:, 1] > 0]
        statistics["divergence"] = lambda indices: float(apart[indices, 0].sum() / labelled[indices, 1].sum())
    num_truncated = sum(len(row) == max_length for row in ids)
    return statistics, sums, num_truncated


def loss_by_source(sums: Mapping[str, np.ndarray], sources: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Return the loss per labelled token of each source's rows, with intervals and differences from the base.

    Args:
        sums: [rows, 2] of each model: summed loss and labelled tokens of each row. All label the same tokens.
        sources: of each row; "" where it names none.
        seed: seed of the bootstrap.

    Returns:
        For each source: its number of rows with a label, each model's figure, and each adapter's less the base's.
        Empty where there is no loss, one source, or more than MAX_MEASURED.
    """
    names = np.array([source or NO_SOURCE for source in sources])
    if not sums or not 1 < len(set(names.tolist())) <= MAX_MEASURED:
        return {}
    is_labelled = sums[BASE][:, 1] > 0
    result = {}
    for source in sorted(set(names[is_labelled].tolist())):
        chosen = (names == source) & is_labelled
        draws = answer_metrics.resamples(int(chosen.sum()), seed)
        figures = {name: source_figures(values[chosen], draws) for name, values in sums.items()}
        apart = {
            name: answer_metrics.differences(figures[name], figures[BASE])["loss"] for name in sums if name != BASE
        }
        kept = {name: {key: of_name["loss"][key] for key in ("value", "interval")} for name, of_name in figures.items()}
        result[source] = {"rows": int(chosen.sum()), "loss": kept, "differences_from_base": apart}
    return result


def source_figures(sums: np.ndarray, draws: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return the loss of rows from [rows, 2] summed losses and labelled tokens, as `answer_metrics.figures` does."""

    def loss(indices: np.ndarray) -> float:
        total = sums[indices].sum(0)
        return float(total[0] / total[1])

    return answer_metrics.figures({"loss": loss}, len(sums), draws)


def answer_statistics(
    answers: Sequence[str], references: Sequence[str], names: Sequence[str], regex: str | None, normaliser: str
) -> dict[str, Statistic]:
    """Return the figures of generated answers."""
    per_row: dict[str, np.ndarray] = {}
    alternatives = [[reference] for reference in references]
    if "exact_match" in names:
        per_row["exact_match"] = answer_metrics.exact_matches(answers, references, regex, normaliser)
    if "rouge" in names:
        per_row |= {kind: values[:, 2] for kind, values in answer_metrics.rouge(answers, alternatives).items()}
    statistics: dict[str, Statistic] = {name: mean_of(values) for name, values in per_row.items()}
    if "bleu" in names:
        statistics["bleu"] = answer_metrics.Bleu.count(answers, alternatives).score
    if "chrf" in names:
        statistics["chrf"] = answer_metrics.Chrf.count(answers, alternatives).score
    return statistics
