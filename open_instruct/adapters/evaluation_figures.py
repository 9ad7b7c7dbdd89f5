"""The figures of an evaluation: losses of given answers, of each source, and of generated answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from open_instruct.adapters import answer_metrics
from open_instruct.adapters.answer_metrics import Statistic, mean_of
from open_instruct.adapters.folders import BASE
from open_instruct.adapters.scoring import answer_losses, divergences
from open_instruct.adapters.served import Served
from open_instruct.adapters.similarity import NAME as SIMILARITY
from open_instruct.adapters.similarity import Similarity
from open_instruct.data import chat
from open_instruct.data.context import Context
from open_instruct.data.questions import Question
from open_instruct.data.sources import MAX_MEASURED, NO_SOURCE
from open_instruct.errors import InputError

IN_CONTEXT = "base + context"


def loss_statistics(
    served: Served,
    name: str,
    rows: Sequence[Question],
    max_length: int | None,
    batch_size: int,
    context: Context | None = None,
    before: Context | None = None,
) -> tuple[dict[str, Statistic], np.ndarray, int]:
    """Return loss and perplexity per labelled token, as statistics of rows that have a labelled token.

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
    ids, spans = chat.tokenize(served.tokenizer, [question.answered for question in rows], max_length or 1 << 30)
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

    statistics = per_token(sums)
    if context:
        if before:
            apart = np.zeros_like(sums)
        else:
            wholes = [context.before(row)[0] for row in ids]
            apart = np.array(divergences(served.adapters.use, name, ids, wholes, spans))
        statistics["divergence"] = lambda indices: float(apart[indices, 0].sum() / sums[indices, 1].sum())
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
        chosen = np.flatnonzero((names == source) & is_labelled)
        draws = answer_metrics.resamples(len(chosen), seed)
        figures = {
            name: answer_metrics.figures({"loss": per_token(values)["loss"]}, chosen, draws)
            for name, values in sums.items()
        }
        apart = {
            name: answer_metrics.differences(figures[name], figures[BASE])["loss"] for name in sums if name != BASE
        }
        kept = {name: {key: of_name["loss"][key] for key in ("value", "interval")} for name, of_name in figures.items()}
        result[source] = {"rows": len(chosen), "loss": kept, "differences_from_base": apart}
    return result


def per_token(sums: np.ndarray, prefix: str = "") -> dict[str, Statistic]:
    """Return loss and perplexity per token as statistics of rows.

    Args:
        sums: [rows, 2] summed losses and numbers of tokens.
        prefix: of the figures' names.
    """

    def loss(indices: np.ndarray) -> float:
        total = sums[indices].sum(0)
        return float(total[0] / total[1])

    def perplexity(indices: np.ndarray) -> float:
        return math.exp(min(loss(indices), 700.0))  # above, float64 overflows

    return {f"{prefix}loss": loss, f"{prefix}perplexity": perplexity}


def answer_statistics(
    answers: Sequence[str],
    references: Sequence[str],
    names: Sequence[str],
    regex: str | None,
    normaliser: str,
    similarity: Similarity | None = None,
) -> dict[str, Statistic]:
    """Return the figures of generated answers."""
    per_row: dict[str, np.ndarray] = {}
    alternatives = [[reference] for reference in references]
    if "exact_match" in names:
        per_row["exact_match"] = answer_metrics.exact_matches(answers, references, regex, normaliser)
    if "rouge" in names:
        per_row |= {kind: values[:, 2] for kind, values in answer_metrics.rouge(answers, alternatives).items()}
    if similarity:
        per_row[SIMILARITY] = similarity.scores(answers, alternatives)
    statistics: dict[str, Statistic] = {name: mean_of(values) for name, values in per_row.items()}
    if "bleu" in names:
        statistics["bleu"] = answer_metrics.Bleu.count(answers, alternatives).score
    if "chrf" in names:
        statistics["chrf"] = answer_metrics.Chrf.count(answers, alternatives).score
    return statistics
