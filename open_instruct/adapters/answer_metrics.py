"""Answers against references: exact match, ROUGE, BLEU and chrF, with bootstrapped intervals."""

from __future__ import annotations

import re
import string
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_instruct.adapters import writing
from open_instruct.bootstrap import interval
from open_instruct.errors import InputError
from open_instruct.limits import SECONDS, evaluating_input

METRICS = ("loss", "exact_match", "rouge", "bleu", "chrf")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
NORMALISERS = ("none", "text", "number")
NUM_RESAMPLES = 1000
Statistic = Callable[[np.ndarray], float]  # indices of rows, some of them repeated → a figure of these rows


def normalise(text: str, how: str) -> str:
    """Return the form of an answer in which it is compared with another.

    Args:
        text: an answer.
        how: "none": as it is, without surrounding white space; "text": lower case, without punctuation and English
            articles (as SQuAD does); "number": without thousands' commas, currency signs and a final point or ".00".
    """
    if how == "text":
        text = "".join(char for char in text.lower() if char not in string.punctuation)
        text = re.sub(r"\b(a|an|the)\b", " ", text)
        return " ".join(text.split())
    if how == "number":
        return re.sub(r"\.0*$", "", re.sub(r"[,$€£\s]", "", text))
    return text.strip()


def check_regex(regex: Any, source: str = "--answer_regex") -> None:
    """Refuse what is no regular expression.

    Args:
        regex: the expression.
        source: where it was given.

    Raises:
        InputError: it is none.
    """
    with evaluating_input(f"{source} {str(regex)[:80]!r}", "give a regular expression of Python"):
        re.compile(regex)


def final_answer(text: str, regex: str | None) -> str:
    """Return the part of an answer that counts: the first group of the regular expression's last match.

    Without a group it is the match, without a match "", and without an expression the answer itself.

    Raises:
        InputError: the expression searches for ever.
    """
    if regex is None:
        return text
    with evaluating_input(f"--answer_regex {regex!r}", "give one that needs no backtracking", SECONDS):
        matches = deque(re.finditer(regex, text), maxlen=1)
    if not matches:
        return ""
    return (matches[0].group(1) if matches[0].re.groups else matches[0].group(0)) or ""


def exact_matches(answers: Sequence[str], references: Sequence[str], regex: str | None, how: str) -> np.ndarray:
    """Return 1 where an answer equals its reference and 0 elsewhere, as [rows] floats.

    An answer in which the expression does not match is wrong.

    Raises:
        InputError: the expression does not match a reference.
    """
    pairs = [(final_answer(a, regex), final_answer(r, regex)) for a, r in zip(answers, references, strict=True)]
    without = next(
        (reference for reference, (_, r) in zip(references, pairs, strict=True) if regex is not None and not r), None
    )
    if without is not None:
        raise InputError(
            f"--answer_regex {regex!r} does not match the answer {without[:80]!r} of the file: "
            "give one that matches all answers"
        )
    return np.array([float((a != "" or regex is None) and normalise(a, how) == normalise(r, how)) for a, r in pairs])


def rouge(
    answers: Iterable[str],
    references: Sequence[Sequence[str]],
    kinds: Sequence[str] = ROUGE[:3],
    stemmer: bool = False,
) -> dict[str, np.ndarray]:
    """Return ROUGE of each row, from 0 to 1: of several references, the figures of the one with the highest F1.

    Sentences of rougeLsum are lines, as rouge-score has it.

    Args:
        answers: one text a row.
        references: one or more texts a row; how most of their letters are written says how the row is cut into words.
        kinds: some of `ROUGE`.
        stemmer: take Porter's stems of the words of rows in Latin script, as English has them.

    Returns:
        For each kind [rows, 3]: precision, recall, F1.

    Raises:
        InputError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE needs rouge-score: pip install '.[eval]', or leave rouge out of the metrics") from None
    latin, other = RougeScorer(kinds, use_stemmer=stemmer), RougeScorer(kinds, tokenizer=writing.Words())
    rows = [
        (latin if writing_of_all(alternatives) == "latin" else other).score_multi(alternatives, answer)
        for answer, alternatives in zip(answers, references, strict=True)
    ]
    return {kind: np.array([row[kind] for row in rows], dtype=float).reshape(-1, 3) for kind in kinds}


def writing_of_all(references: Sequence[str]) -> str:
    """Return how most letters of a row's references are written; see `writing.writing_of`."""
    return writing.writing_of("\n".join(references))


@dataclass(frozen=True)
class Bleu:
    """The counts of each row from which BLEU is computed.

    Args:
        counts: [rows, 10] matches of 1- to 4-grams, their totals, and the lengths of answer and reference in tokens.
            Of several references, an n-gram matches in any, and the length is that of the nearest.
        each: [rows] BLEU of each row alone, from 0 to 100, with sacrebleu's effective order.
    """

    counts: np.ndarray
    each: np.ndarray

    @classmethod
    def count(cls, answers: Iterable[str], references: Sequence[Sequence[str]]) -> Bleu:
        """Count the n-grams of answers, with sacrebleu's tokeniser for the script of each row's references, mostly 13a.

        Raises:
            InputError: sacrebleu is not installed.
        """
        try:
            from sacrebleu.metrics import BLEU
        except ImportError:
            raise InputError("BLEU needs sacrebleu: pip install '.[eval]', or leave bleu out of the metrics") from None
        metrics = {
            name: BLEU(effective_order=True, tokenize=name) for name in dict.fromkeys(writing.BLEU_TOKENISERS.values())
        }
        rows = [
            metrics[writing.BLEU_TOKENISERS[writing_of_all(alternatives)]].sentence_score(answer, alternatives)
            for answer, alternatives in zip(answers, references, strict=True)
        ]
        counts = [[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows]
        return cls(np.array(counts, dtype=int).reshape(-1, 10), np.array([row.score for row in rows]))

    def score(self, rows: np.ndarray) -> float:
        """Return the corpus BLEU of some rows, from 0 to 100."""
        from sacrebleu.metrics import BLEU

        total = [int(number) for number in self.counts[rows].sum(0)]
        return float(
            BLEU.compute_bleu(total[:4], total[4:8], sys_len=total[8], ref_len=total[9], smooth_method="exp").score
        )


@dataclass(frozen=True)
class Chrf:
    """The counts of each row from which chrF (Popović 2015) is computed, as sacrebleu's chrF2: without white space.

    With m[n] matches of n-grams of characters, a[n] of them in the answers and r[n] in the references, n from 1 to 6,

        P = mean of m[n] / a[n],  R = mean of m[n] / r[n],  chrF = 100 · 5 P R / (4 P + R),

    where the means leave out the n that have no n-gram in the answers or in the references.

    Args:
        counts: [rows, 18] a[n], r[n], m[n] of n = 1, 2 …; of several references, the one with the highest chrF.
        each: [rows] chrF of each row alone, from 0 to 100.
    """

    counts: np.ndarray
    each: np.ndarray

    @classmethod
    def count(cls, answers: Iterable[str], references: Sequence[Sequence[str]]) -> Chrf:
        """Count the n-grams of answers."""
        counts, each = [], []
        for answer, alternatives in zip(answers, references, strict=True):
            ngrams = character_ngrams(answer)
            rows = [matches(ngrams, character_ngrams(reference)) for reference in alternatives]
            scores = [chrf(row) for row in rows]
            counts.append(rows[int(np.argmax(scores))])
            each.append(max(scores))
        return cls(np.array(counts, dtype=int).reshape(-1, 18), np.array(each))

    def score(self, rows: np.ndarray) -> float:
        """Return the corpus chrF of some rows, from 0 to 100."""
        return chrf(self.counts[rows].sum(0))


def character_ngrams(text: str) -> list[Counter[str]]:
    """Return how often each n-gram of 1 to 6 characters occurs in a text without white space."""
    text = "".join(text.split())
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, 7)]


def matches(answer: list[Counter[str]], reference: list[Counter[str]]) -> list[int]:
    """Return the counts of one row of `Chrf`; an answer's n-grams count where the reference has some of that length."""
    counts = []
    for ours, theirs in zip(answer, reference, strict=True):
        counts += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return counts


def chrf(counts: Sequence[int] | np.ndarray) -> float:
    """Return chrF, from 0 to 100, of the sums of counts [18]."""
    table = np.asarray(counts, dtype=float).reshape(6, 3)
    table = table[(table[:, :2] > 0).all(1)]
    if not table[:, 2].sum():
        return 0.0
    precision, recall = (table[:, 2:] / table[:, :2]).mean(0)
    return float(100 * 5 * precision * recall / (4 * precision + recall))


def mean_of(values: np.ndarray) -> Statistic:
    """Return a statistic: the mean of a value over rows."""
    return lambda rows: float(values[rows].mean())


def chosen_rows(num_rows: int, max_samples: int | None, seed: int) -> list[int]:
    """Return the numbers of the rows that are measured, in order: all, or `max_samples` of them, drawn by seed."""
    drawn = np.random.default_rng([seed, 0xE7]).permutation(num_rows)[: max_samples or num_rows]
    return [int(number) for number in np.sort(drawn)]


def resamples(num_rows: int, seed: int) -> list[np.ndarray]:
    """Draw indices of rows with replacement, the same for every adapter, so that differences are paired."""
    generator = np.random.default_rng([seed, 0xB007])
    return [generator.integers(0, num_rows, num_rows) for _ in range(NUM_RESAMPLES)]


def figures(
    statistics: dict[str, Statistic], rows: np.ndarray, draws: Sequence[np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return value, interval and bootstrapped values ("drawn") of each figure of one adapter.

    Args:
        statistics: the figures.
        rows: the indices of the rows that they are of.
        draws: `resamples` of so many rows.
    """
    results = {}
    for name, statistic in statistics.items():
        drawn = [statistic(rows[draw]) for draw in draws]
        results[name] = {"value": statistic(rows), "interval": interval(drawn), "drawn": drawn}
    return results


def differences(adapter: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each figure that both have, an adapter's less the base's on the same rows, with that interval."""
    return {
        name: {
            "value": figure["value"] - base[name]["value"],
            "interval": interval([a - b for a, b in zip(figure["drawn"], base[name]["drawn"], strict=True)]),
        }
        for name, figure in adapter.items()
        if name in base
    }
