"""Files of answers that exist already, measured against references: no model is loaded, and nothing imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from open_instruct.adapters import answer_metrics
from open_instruct.adapters.answer_files import AnsweredQuestion, read_answers
from open_instruct.adapters.answer_scores import ROUGE, SEVERAL, Measures, ModelScores, compared_forms
from open_instruct.adapters.own_metrics import OwnMetric, load_metric
from open_instruct.adapters.similarity import NAME as SIMILARITY
from open_instruct.adapters.similarity import load_similarity
from open_instruct.data.bad_rows import BadRows
from open_instruct.errors import InputError, warn

METRICS = tuple(name for name in answer_metrics.METRICS if name != "loss")  # of answers alone
EXAMPLES = 20  # questions in evaluation.json


def evaluate_answers(
    answers: Sequence[str] | str,
    file: str | None = None,
    names: Sequence[str] = METRICS,
    answer_regex: str | None = None,
    normaliser: str = "none",
    several: Sequence[str] | None = None,
    pass_at: Sequence[int] = (),
    metric: Sequence[str] | str = (),
    stemmer: bool = False,
    max_samples: int | None = None,
    seed: int = 42,
    bad_rows: str = "error",
    similarity_model: str | None = None,
) -> dict[str, Any]:
    """Measure answers that exist already; the flags of `evaluate_peft.py --help` say more of the arguments.

    Args:
        answers: files of answers, each as FILE or NAME=FILE.
        file: questions with references, for rows that have none.
        names: some of `METRICS`.
        answer_regex: finds the part of an answer that counts for exact match and votes.
        normaliser: one of `answer_metrics.NORMALISERS`, for exact match and votes.
        several: how several answers to a question are combined, some of `answer_scores.SEVERAL`; None: mean, best and
            vote where there are several.
        pass_at: the k of pass@k.
        metric: functions of one's own, each as FILE.py:FUNCTION; their code is run.
        stemmer: ROUGE compares stems of English words.
        max_samples: number of questions, drawn by seed; None: all.
        seed: seed of the choice of questions and of the bootstrap.
        bad_rows: "error", or "skip": leave out rows that can't be used, and questions that a file lacks.
        similarity_model: model of sentence-transformers by which answers are compared with references, the nearest of
            several; None: none.

    Returns:
        Content of evaluation.json.

    Raises:
        InputError: wrong input.
    """
    words = [answers] if isinstance(answers, str) else list(answers)
    own = [load_metric(word) for word in ([metric] if isinstance(metric, str) else metric)]
    check_names(own)
    if pass_at and "exact_match" not in names and not own:
        raise InputError("--pass_at needs to know which answers are right: add exact_match to --metrics, or a --metric")
    rows = read_answers(words, file, bad_rows)
    if names or similarity_model:
        rows = with_references(rows, bad_rows)
    rows = [rows[i] for i in answer_metrics.chosen_rows(len(rows), max_samples, seed)]
    similarity = load_similarity(similarity_model) if similarity_model else None
    measures = Measures(names, own, answer_regex, normaliser, stemmer, similarity)
    return model_figures(rows, measures, several, sorted(set(pass_at)), seed) | {
        "answers": words,
        "file": file,
        "similarity_model": similarity_model,
        "metric": [f"{one.path}:{one.name}" for one in own],
    }


def check_names(own: Sequence[OwnMetric]) -> None:
    """Refuse own metrics whose figures would have the name of another figure.

    Raises:
        InputError: one does.
    """
    taken = {*METRICS, SIMILARITY, *ROUGE, *(f"{kind}_{part}" for kind in ROUGE for part in ("precision", "recall"))}
    for metric in own:
        if metric.name in taken:
            raise InputError(f"--metric {metric.path}:{metric.name}: a figure has that name: rename the function")
        taken.add(metric.name)


def with_references(rows: Sequence[AnsweredQuestion], bad_rows: str) -> list[AnsweredQuestion]:
    """Return the rows that have a reference.

    Raises:
        InputError: one has none, and `bad_rows` is not "skip".
    """
    bad = BadRows(bad_rows == "skip")
    for row in rows:
        if row.references:
            bad.keep()
        else:
            bad.add(InputError(f"{row.source}: no `reference` to compare with: add it, or give a --file that has it"))
    bad.check()
    if bad.num_bad:
        warn(bad.summary())
    return [row for row in rows if row.references]


def model_figures(
    rows: Sequence[AnsweredQuestion],
    measures: Measures,
    several: Sequence[str] | None,
    pass_at: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Return the figures of all models, and the differences of each two; see `evaluate_answers`.

    Raises:
        InputError: a flag has no effect with such answers, or a score can't be computed.
    """
    models = list(rows[0].answers)
    counts = {name: [len(row.answers[name]) for row in rows] for name in models}
    most = max(max(numbers) for numbers in counts.values())
    if several is not None and most == 1:
        raise InputError("--several has no effect: every question has one answer; drop it")
    beyond = next((k for k in pass_at if k > most), None)
    if beyond is not None:
        raise InputError(f"--pass_at {beyond} needs as many answers to a question: the largest number here is {most}")
    ways = several if several is not None else SEVERAL[:1] if most == 1 else SEVERAL[:3]
    sources = [row.source for row in rows]
    references = [row.references for row in rows]
    forms = compared_forms(references, measures) if "exact_match" in measures.names else []
    draws = answer_metrics.resamples(len(rows), seed)
    figures = {}
    for name in models:
        scores = ModelScores(name, sources, [row.answers[name] for row in rows], references, forms, measures)
        figures[name] = answer_metrics.figures(scores.statistics(ways, pass_at), np.arange(len(rows)), draws)
    order = sorted(models, key=lambda name: name != "base")  # differences are from the base, where there is one
    differences = [
        {"model": b, "baseline": a, "figures": answer_metrics.differences(figures[b], figures[a])}
        for a, b in combinations(order, 2)
    ]
    for by_name in figures.values():
        for figure in by_name.values():
            del figure["drawn"]
    return {
        "rows": len(rows),
        "answers_per_question": {name: [min(numbers), max(numbers)] for name, numbers in counts.items()},
        "references_per_question": [min(map(len, references)), max(map(len, references))],
        "several": list(ways),
        "answer_regex": measures.regex,
        "normaliser": measures.normaliser,
        "stemmer": measures.stemmer,
        "writing": dict(Counter(answer_metrics.writing_of_all(texts) for texts in references if texts)),
        "figures": {name: figures[name] for name in order},
        "differences": differences,
        "examples": [
            {
                "question": row.text,
                "references": list(row.references),
                "answers": {name: list(texts) for name, texts in row.answers.items()},
            }
            for row in rows[:EXAMPLES]
        ],
    }
