"""Answers against references, with intervals: exact match, ROUGE, BLEU, loss. The figures are those of rouge-score and sacrebleu."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_instruct.errors import InputError

NORMALISERS = ("none", "text", "number")
RESAMPLES = 1000
Statistic = Callable[[np.ndarray], float]  # indices of rows, repeated ones included → a figure of them


def normalise(text: str, how: str) -> str:
    """What two answers are compared by.

    Args:
        text: an answer.
        how: "none": as it is, without surrounding white space; "text": lower case, without punctuation and English articles (SQuAD);
            "number": without thousands' commas, currency signs and a final point or ".00".
    """
    if how == "text":
        text = "".join(char for char in text.lower() if char not in string.punctuation)
        text = re.sub(r"\b(a|an|the)\b", " ", text)
        return " ".join(text.split())
    if how == "number":
        return re.sub(r"\.0*$", "", re.sub(r"[,$€£\s]", "", text))
    return text.strip()


def final_answer(text: str, regex: str | None) -> str:
    """The part of an answer that counts: the last match's first group (the whole match where it has none); "" where none matches."""
    if regex is None:
        return text
    found = list(re.finditer(regex, text))
    if not found:
        return ""
    return (found[-1].group(1) if found[-1].re.groups else found[-1].group(0)) or ""


def exact_matches(answers: Sequence[str], references: Sequence[str], regex: str | None, how: str) -> np.ndarray:
    """1 where an answer is the reference, else 0. An answer in which the expression does not match is wrong.

    Raises:
        InputError: the expression does not match a reference.
    """
    pairs = [(final_answer(a, regex), final_answer(r, regex)) for a, r in zip(answers, references, strict=True)]
    without = next(
        (reference for reference, (_, r) in zip(references, pairs, strict=True) if regex is not None and not r), None
    )
    if without is not None:
        raise InputError(
            f"--answer_regex {regex!r} does not match the answer {without[:80]!r} of the file: give one that matches all answers"
        )
    return np.array([float((a != "" or regex is None) and normalise(a, how) == normalise(r, how)) for a, r in pairs])


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L of each row, without stemming, from 0 to 1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE needs rouge-score: pip install '.[eval]', or leave rouge out of --metrics") from None
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    rows = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: np.array([row[name].fmeasure for row in rows]) for name in names}


@dataclass(frozen=True)
class Bleu:
    """What BLEU counts in each row: [rows, 10] matches and totals of 1- to 4-grams, lengths of answer and reference."""

    counts: np.ndarray

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str]) -> Bleu:
        """Count, with sacrebleu's own tokeniser (13a)."""
        try:
            from sacrebleu.metrics import BLEU
        except ImportError:
            raise InputError("BLEU needs sacrebleu: pip install '.[eval]', or leave bleu out of --metrics") from None
        metric = BLEU(effective_order=True)
        rows = [
            metric.sentence_score(answer, [reference]) for answer, reference in zip(answers, references, strict=True)
        ]
        return cls(np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows]))

    def score(self, rows: np.ndarray) -> float:
        """Corpus BLEU of some rows, from 0 to 100."""
        from sacrebleu.metrics import BLEU

        total = [int(number) for number in self.counts[rows].sum(0)]
        return float(
            BLEU.compute_bleu(total[:4], total[4:8], sys_len=total[8], ref_len=total[9], smooth_method="exp").score
        )


def resamples(number: int, seed: int) -> list[np.ndarray]:
    """Indices of rows drawn with replacement, the same for every adapter, so that differences are paired."""
    generator = np.random.default_rng([seed, 0xB007])
    return [generator.integers(0, number, number) for _ in range(RESAMPLES)]


def interval(values: Sequence[float]) -> list[float]:
    """The middle 95 % of bootstrapped values."""
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]


def figures(statistics: dict[str, Statistic], number: int, draws: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Value, interval and bootstrapped values of each figure of one adapter."""
    every = np.arange(number)
    found = {}
    for name, statistic in statistics.items():
        drawn = [statistic(rows) for rows in draws]
        found[name] = {"value": statistic(every), "interval": interval(drawn), "drawn": drawn}
    return found


def differences(mine: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each figure less the base's on the same rows, with the interval of that difference."""
    return {
        name: {
            "value": figure["value"] - base[name]["value"],
            "interval": interval([a - b for a, b in zip(figure["drawn"], base[name]["drawn"], strict=True)]),
        }
        for name, figure in mine.items()
    }
