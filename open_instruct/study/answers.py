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
from open_instruct.ranking import finite_or_inf
from open_instruct.study.config import ANSWER_METRICS, Study
from open_instruct.study.results import StudyResults, TrialResult

EXACT_MATCH = "exact_match"
LOSS = "loss"  # of the answers of a file
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
    """The difference between the figures of two methods, in the order of `AnswerFigure.methods`."""

    first: str
    second: str
    value: float  # the first's less the second's
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
    methods: list[AnswerEstimate]  # highest first; of a loss the lowest
    pairs: list[AnswerDifference]

    @property
    def title(self) -> str:
        """Return the figure and its questions, for tables and pictures."""
        return title_of((self.asked, self.figure))


@dataclass(frozen=True)
class TokenLosses:
    """Losses of the answers that a file has, of the rows of which a token is labelled.

    Args:
        counts: [rows, 2] summed loss in nats, and labelled tokens.
    """

    counts: np.ndarray

    def score(self, rows: np.ndarray) -> float:
        """Return the loss of some rows, in nats per labelled token."""
        total = self.counts[rows].sum(0)
        return float(total[0] / total[1])


Score = np.ndarray | Bleu | Chrf | TokenLosses  # of each question, or what a figure of all of them is computed from
Key = tuple[str, str]  # which questions, and the figure
Scores = dict[Key, Score]  # of one model


def title_of(key: Key) -> str:
    """Return a figure with its questions, for tables and pictures."""
    asked, figure = key
    return figure if asked == TEST else f"{figure}, {asked}"


def load_measures(study: Study) -> Measures:
    """Load what a study's figures need: packages, the user's functions (their code is run), the embeddings' model.

    One pair of words is scored, so that whatever is missing is said before the first trial.

    Raises:
        InputError: something is missing, or can't be used.
    """
    own = [load_metric(word, "report.metrics") for word in study.metrics if word not in ANSWER_METRICS]
    taken = {LOSS, *ANSWER_METRICS, SIMILARITY, *ROUGE_SHOWN}
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


def scores_of(figures: dict[str, Any], measures: Measures, name: str) -> Scores:
    """Return the scores of a model's answers.

    Args:
        figures: what `measure_trial` kept of the model.
        measures: what is computed.
        name: of the model, for errors.

    Raises:
        InputError: a function of the user fails.
    """
    if not figures["answers"]:  # there were no questions, or an older version kept none
        return {(TEST, EXACT_MATCH): np.array(figures["exact"])} if figures["exact"] else {}
    test = answer_scores(figures["answers"], figures["references"], measures, name)
    scores: Scores = {(TEST, figure): score for figure, score in test.items()}
    for file, content in figures["files"].items():
        losses = np.array(content["losses"], dtype=float)
        scores[file, LOSS] = TokenLosses(losses[losses[:, 1] > 0])
        of_file = answer_scores(content["answers"], content["references"], measures, f"{name}, {file}")
        scores |= {(file, figure): score for figure, score in of_file.items()}
    return scores


def answer_scores(
    answers: Sequence[str], references: Sequence[str], measures: Measures, name: str
) -> dict[str, np.ndarray | Bleu | Chrf]:
    """Return the scores of answers to the same questions, by figure; see `scores_of`."""
    exact = exact_matches(answers, references, measures.regex, measures.normaliser)
    scores: dict[str, np.ndarray | Bleu | Chrf] = {EXACT_MATCH: exact}
    sources = [f"question {number}" for number in range(1, len(answers) + 1)]
    each = [[answer] for answer in answers], [[reference] for reference in references]
    found = ModelScores(name, sources, *each, [], measures).scores
    own = [metric.name for metric in measures.own]
    scores |= {figure: found.values[figure] for figure in (*ROUGE_SHOWN, SIMILARITY, *own) if figure in found.values}
    return scores | found.corpora


def value_of(score: Score) -> float:
    """Return a figure of all questions."""
    return float(score.mean()) if isinstance(score, np.ndarray) else score.score(np.arange(len(score.counts)))


def draws_of(scores: Sequence[Score], resampling: Resampling) -> np.ndarray:
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
    return value_of(scores[TEST, EXACT_MATCH]) if (TEST, EXACT_MATCH) in scores else math.nan


def answer_figures(chosen: dict[str, list[TrialResult]], scores: StudyScores) -> list[AnswerFigure]:
    """Return all figures of the chosen trials' answers, with intervals over questions and seeds.

    Args:
        chosen: trials with the chosen parameters, one for each seed, by the method's name.
        scores: of all trials and bases.
    """
    figures = []
    for key, score in scores.bases[next(iter(chosen))].items():
        num_questions = len(score if isinstance(score, np.ndarray) else score.counts)
        by_method = {name: [scores.trials[one.folder][key] for one in each] for name, each in chosen.items()}
        base = {name: scores.bases[name][key] for name in chosen}
        figures.append(figure_of(key, num_questions, by_method, base, Resampling(np.ones(num_questions))))
    return figures


def figure_of(
    key: Key,
    num_questions: int,
    scores: dict[str, list[Score]],
    base_scores: dict[str, Score],
    resampling: Resampling,
) -> AnswerFigure:
    """Return one figure of all methods.

    Args:
        key: which questions, and the figure.
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
    asked, figure = key
    sign = 1 if figure == LOSS else -1
    estimates.sort(key=lambda estimate: finite_or_inf(sign * estimate.value))
    level = 1 - 0.05 / max(1, math.comb(len(estimates), 2))
    pairs = []
    for one, other in combinations(estimates, 2):
        bounds = interval(draws[one.name] - draws[other.name], level)
        clear = bounds[1] < 0 if figure == LOSS else bounds[0] > 0
        pairs.append(AnswerDifference(one.name, other.name, one.value - other.value, bounds, clear))
    first = next(iter(base_scores))
    base, base_interval = value_of(base_scores[first]), interval(base_draws[first])
    return AnswerFigure(figure, asked, num_questions, base, base_interval, estimates, pairs)
