"""Figures of the answers of a study's trials: exact match, ROUGE, BLEU, chrF, similarity, and functions of the user.

Trials keep their answers, and the report computes the figures. So a figure that is added to a finished study costs no
training, and a user's function that fails costs none either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from open_instruct.adapters.answer_metrics import ROUGE, Bleu, Chrf, exact_matches
from open_instruct.adapters.answer_scores import Measures, ModelScores
from open_instruct.adapters.own_metrics import load_metric
from open_instruct.adapters.similarity import NAME as SIMILARITY
from open_instruct.adapters.similarity import load_similarity
from open_instruct.bootstrap import Resampling, interval
from open_instruct.errors import InputError
from open_instruct.study.config import ANSWER_METRICS, Study
from open_instruct.study.results import StudyResults, TrialResult

EXACT_MATCH = "exact_match"
ROUGE_SHOWN = ROUGE[:3]  # by their F1, as evaluate_peft.py shows them of models
TEST = "test rows"  # the held-out rows that trials answer
BASE = "base model"


@dataclass(frozen=True)
class AnswerEstimate:
    """A figure of the answers of a method's chosen trials, or of a base model."""

    name: str
    value: float  # mean over seeds
    interval: list[float]
    by_seed: list[float]
    less_base: float
    less_base_interval: list[float]


@dataclass(frozen=True)
class AnswerDifference:
    """The difference between the figures of two methods, the higher one less the lower one."""

    higher: str
    lower: str
    value: float
    interval: list[float]
    clear: bool  # larger than chance would explain


@dataclass(frozen=True)
class AnswerFigure:
    """A figure of all methods' answers to the same questions."""

    figure: str
    asked: str  # which questions
    num_questions: int
    base: float  # of the first method's base model
    base_interval: list[float]
    methods: list[AnswerEstimate]  # highest first
    pairs: list[AnswerDifference]

    @property
    def title(self) -> str:
        """Return the figure and its questions, for tables and pictures."""
        return self.figure if self.asked == TEST else f"{self.figure}, {self.asked}"


def load_measures(study: Study) -> Measures:
    """Load what a study's figures need: packages, the user's functions (their code is run), the embeddings' model.

    One pair of words is scored, so that whatever is missing is said before the first trial.

    Raises:
        InputError: something is missing, or can't be used.
    """
    own = [load_metric(word, "report.metrics") for word in study.metrics if word not in ANSWER_METRICS]
    taken = {*ANSWER_METRICS, SIMILARITY, *ROUGE_SHOWN}
    for metric in own:
        if metric.name in taken:
            raise InputError(f"report.metrics {metric.path}:{metric.name}: a figure has that name: rename the function")
        taken.add(metric.name)
    names = [name for name in study.metrics if name in ANSWER_METRICS and name != EXACT_MATCH]
    source = study.similarity_model
    similarity = load_similarity(source, "report.similarity_model") if source else None
    measures = Measures(names, own, study.answer_regex, study.normalise, similarity=similarity)
    known = Measures(names, similarity=similarity)  # a user's function need not know such an answer
    ModelScores("a word", ["a word"], [["a"]], [["a"]], [], known)
    return measures


Scores = dict[str, np.ndarray | Bleu | Chrf]  # of one model's answers, by figure: of each question, or counts


def scores_of(figures: dict[str, Any], measures: Measures, name: str) -> Scores:
    """Return the scores of a model's answers.

    Args:
        figures: what `measure_trial` kept of the model.
        measures: what is computed.
        name: of the model, for errors.

    Raises:
        InputError: a function of the user fails.
    """
    answers, references = figures["answers"], figures["references"]
    if not answers:  # there were no questions, or an older version kept none
        return {EXACT_MATCH: np.array(figures["exact"])} if figures["exact"] else {}
    scores: Scores = {EXACT_MATCH: exact_matches(answers, references, measures.regex, measures.normaliser)}
    sources = [f"question {number}" for number in range(1, len(answers) + 1)]
    each = [[answer] for answer in answers], [[reference] for reference in references]
    found = ModelScores(name, sources, *each, [], measures).scores
    own = [metric.name for metric in measures.own]
    scores |= {name: found.values[name] for name in (*ROUGE_SHOWN, SIMILARITY, *own) if name in found.values}
    return scores | found.corpora


def value_of(score: np.ndarray | Bleu | Chrf) -> float:
    """Return a figure of all questions."""
    return float(score.mean()) if isinstance(score, np.ndarray) else score.score(np.arange(len(score.counts)))


def draws_of(scores: Sequence[np.ndarray | Bleu | Chrf], resampling: Resampling) -> np.ndarray:
    """Return the bootstrapped means over seeds [B] of a figure, of the scores with each seed."""
    means = [score for score in scores if isinstance(score, np.ndarray)]
    if means:
        return resampling.draws(np.array(means))
    return resampling.draws_of_statistics([score.score for score in scores if not isinstance(score, np.ndarray)])


@dataclass(frozen=True)
class StudyScores:
    """The scores of all answers of a study.

    Args:
        trials: of each trial that succeeded, by its folder.
        bases: of the base model that each method started from, by the method's name.
    """

    trials: dict[str, Scores]
    bases: dict[str, Scores]


def score_all(results: StudyResults, measures: Measures) -> StudyScores:
    """Score the answers of all finished trials and their bases.

    Raises:
        InputError: a function of the user fails.
    """
    trials = {
        result.folder: scores_of(result.summary["study"], measures, result.folder)
        for result in results.trials
        if not result.failed
    }
    bases: dict[str, Scores] = {}
    known: dict[int, Scores] = {}  # methods share bases
    for name, base in results.bases.items():
        bases[name] = known.setdefault(id(base), {}) or scores_of(base["study"], measures, f"{BASE} of {name}")
        known[id(base)] = bases[name]
    return StudyScores(trials, bases)


def exact_match(scores: Scores) -> float:
    """Return the share of right answers; nan where the study asks no questions."""
    return value_of(scores[EXACT_MATCH]) if EXACT_MATCH in scores else math.nan


def answer_figures(chosen: dict[str, list[TrialResult]], scores: StudyScores) -> list[AnswerFigure]:
    """Return all figures of the chosen trials' answers, with intervals over questions and seeds.

    Args:
        chosen: trials with the chosen parameters, one for each seed, by the method's name.
        scores: of all trials and bases.
    """
    figures = []
    for figure, score in scores.bases[next(iter(chosen))].items():
        num_questions = len(score if isinstance(score, np.ndarray) else score.counts)
        by_method = {name: [scores.trials[one.folder][figure] for one in each] for name, each in chosen.items()}
        base = {name: scores.bases[name][figure] for name in chosen}
        figures.append(figure_of(figure, TEST, num_questions, by_method, base, Resampling(np.ones(num_questions))))
    return figures


def figure_of(
    figure: str,
    asked: str,
    num_questions: int,
    scores: dict[str, list[np.ndarray | Bleu | Chrf]],
    base_scores: dict[str, np.ndarray | Bleu | Chrf],
    resampling: Resampling,
) -> AnswerFigure:
    """Return one figure of all methods.

    Args:
        figure: its name.
        asked: which questions were asked.
        num_questions: how many.
        scores: of each method's chosen trials, one for each seed.
        base_scores: of each method's base model.
        resampling: the draws of questions and seeds that all methods share.
    """
    draws = {name: draws_of(each, resampling) for name, each in scores.items()}
    base_draws = {name: draws_of([score], resampling) for name, score in base_scores.items()}
    estimates = []
    for name, each in scores.items():
        by_seed, base = [value_of(score) for score in each], value_of(base_scores[name])
        mean = float(np.mean(by_seed))
        less_base = interval(draws[name] - base_draws[name])
        estimates.append(AnswerEstimate(name, mean, interval(draws[name]), by_seed, mean - base, less_base))
    estimates.sort(key=lambda estimate: -estimate.value)
    level = 1 - 0.05 / max(1, math.comb(len(estimates), 2))
    pairs = []
    for higher, lower in combinations(estimates, 2):
        bounds = interval(draws[higher.name] - draws[lower.name], level)
        pairs.append(AnswerDifference(higher.name, lower.name, higher.value - lower.value, bounds, bounds[0] > 0))
    first = next(iter(base_scores))
    return AnswerFigure(
        figure, asked, num_questions, value_of(base_scores[first]), interval(base_draws[first]), estimates, pairs
    )
