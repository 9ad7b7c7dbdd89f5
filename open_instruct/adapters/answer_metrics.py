"""Answers against references: exact match, ROUGE (rouge-score) and BLEU (sacrebleu), with bootstrapped intervals."""

from __future__ import annotations

import re
import string
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from open_instruct.adapters import writing
from open_instruct.bootstrap import interval
from open_instruct.errors import InputError
from open_instruct.limits import SECONDS, evaluating_input

METRICS = ("loss", "exact_match", "rouge", "bleu")
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


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L of each row, without stemming, from 0 to 1.

    `writing` says how a row is cut into words if its reference is not in Latin script.

    Raises:
        InputError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE needs rouge-score: pip install '.[eval]', or leave rouge out of --metrics") from None
    names = ["rouge1", "rouge2", "rougeL"]
    latin, other = RougeScorer(names), RougeScorer(names, tokenizer=writing.Words())
    rows = [
        (latin if writing.writing_of(reference) == "latin" else other).score(reference, answer)
        for answer, reference in zip(answers, references, strict=True)
    ]
    return {name: np.array([row[name].fmeasure for row in rows]) for name in names}


@dataclass(frozen=True)
class Bleu:
    """The counts of each row from which BLEU is computed.

    Args:
        counts: [rows, 10] matches of 1- to 4-grams, their totals, and the lengths of answer and reference in tokens.
    """

    counts: np.ndarray

    @classmethod
    def count(cls, answers: Sequence[str], references: Sequence[str]) -> Bleu:
        """Count the n-grams of answers, with sacrebleu's tokeniser for the script of each reference, mostly 13a.

        Raises:
            InputError: sacrebleu is not installed.
        """
        try:
            from sacrebleu.metrics import BLEU
        except ImportError:
            raise InputError("BLEU needs sacrebleu: pip install '.[eval]', or leave bleu out of --metrics") from None
        metrics = {
            name: BLEU(effective_order=True, tokenize=name) for name in dict.fromkeys(writing.BLEU_TOKENISERS.values())
        }
        rows = [
            metrics[writing.BLEU_TOKENISERS[writing.writing_of(reference)]].sentence_score(answer, [reference])
            for answer, reference in zip(answers, references, strict=True)
        ]
        return cls(np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows]))

    def score(self, rows: np.ndarray) -> float:
        """Return the corpus BLEU of some rows, from 0 to 100."""
        from sacrebleu.metrics import BLEU

        total = [int(number) for number in self.counts[rows].sum(0)]
        return float(
            BLEU.compute_bleu(total[:4], total[4:8], sys_len=total[8], ref_len=total[9], smooth_method="exp").score
        )


def resamples(num_rows: int, seed: int) -> list[np.ndarray]:
    """Draw indices of rows with replacement, the same for every adapter, so that differences are paired."""
    generator = np.random.default_rng([seed, 0xB007])
    return [generator.integers(0, num_rows, num_rows) for _ in range(NUM_RESAMPLES)]


def figures(statistics: dict[str, Statistic], num_rows: int, draws: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return value, interval and bootstrapped values ("drawn") of each figure of one adapter."""
    all_rows = np.arange(num_rows)
    results = {}
    for name, statistic in statistics.items():
        drawn = [statistic(rows) for rows in draws]
        results[name] = {"value": statistic(all_rows), "interval": interval(drawn), "drawn": drawn}
    return results


def differences(adapter: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return each figure of an adapter less the base's on the same rows, with the interval of that difference."""
    return {
        name: {
            "value": figure["value"] - base[name]["value"],
            "interval": interval([a - b for a, b in zip(figure["drawn"], base[name]["drawn"], strict=True)]),
        }
        for name, figure in adapter.items()
    }
