"""Figures of one model's answers to questions: of one or several answers each, against one or several references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from open_instruct.adapters.answer_metrics import ROUGE, Bleu, Chrf, Statistic, final_answer, mean_of, normalise, rouge
from open_instruct.adapters.own_metrics import OwnMetric
from open_instruct.adapters.similarity import NAME as SIMILARITY
from open_instruct.adapters.similarity import Similarity
from open_instruct.errors import InputError

SEVERAL = ("mean", "best", "vote", "concatenate")
PARTS = ("precision", "recall")  # of ROUGE, beside its F1, which has the plain name


@dataclass(frozen=True)
class Measures:
    """What is computed of an answer.

    Args:
        names: some of exact_match, rouge, bleu and chrf.
        own: functions of the user.
        regex: finds the part of an answer that counts for exact match and votes; None: all of it.
        normaliser: one of `answer_metrics.NORMALISERS`, for exact match and votes.
        stemmer: ROUGE compares stems of English words.
        similarity: compares embeddings; None: they are not compared.
    """

    names: Sequence[str]
    own: Sequence[OwnMetric] = ()
    regex: str | None = None
    normaliser: str = "none"
    stemmer: bool = False
    similarity: Similarity | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of A answers.

    Args:
        values: of each figure that is a mean [A].
        corpora: of BLEU and chrF, which are figures of all answers together.
    """

    values: dict[str, np.ndarray]
    corpora: dict[str, Bleu | Chrf]


def compared_forms(references: Sequence[Sequence[str]], measures: Measures) -> list[set[str]]:
    """Return the references of each question in the form in which they are compared with answers.

    The expression's match counts, as in answers. If it matches in none, they are final answers already.

    Raises:
        InputError: the expression matches in some references and not in others.
    """
    found = [[final_answer(text, measures.regex) for text in texts] for texts in references]
    matched = [text != "" for texts in found for text in texts]
    if measures.regex is None or not any(matched):
        found = [list(texts) for texts in references]
    elif not all(matched):
        without = [text for texts in references for text in texts][matched.index(False)]
        raise InputError(
            f"--answer_regex {measures.regex!r} does not match the reference {without[:80]!r}, and does match others: "
            "give one that matches all of them, or references that are final answers"
        )
    return [{normalise(text, measures.normaliser) for text in texts} for texts in found]


class ModelScores:
    """The scores of one model's answers.

    Args:
        name: of the model, for errors and the progress bar.
        sources: of the N questions, for errors.
        answers: one or more texts for each question.
        references: texts for each question; may be empty where only own metrics are computed.
        forms: `compared_forms` of the references.
        measures: what is computed.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[str],
        answers: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        forms: Sequence[set[str]],
        measures: Measures,
    ) -> None:
        """Compute the scores of all answers."""
        self.name, self.sources, self.measures = name, sources, measures
        self.answers, self.references, self.forms = answers, references, forms
        self.counts = np.array([len(texts) for texts in answers])
        self.starts = np.cumsum(self.counts) - self.counts
        self.scores = self.scored(answers)

    def scored(self, answers: Sequence[Sequence[str]]) -> Scores:
        """Return the scores of one or more texts for each question.

        Raises:
            InputError: a package is missing, or a function of the user fails.
        """
        measures = self.measures
        texts = [text for one in answers for text in one]
        owners = [number for number, one in enumerate(answers) for _ in one]
        references = [self.references[number] for number in owners]
        values: dict[str, np.ndarray] = {}
        corpora: dict[str, Bleu | Chrf] = {}
        if "exact_match" in measures.names:
            values["exact_match"] = np.array(
                [float(self.form(text) in self.forms[number]) for text, number in zip(texts, owners, strict=True)]
            )
        if "rouge" in measures.names:
            for kind, triples in rouge(self.bar(texts, "ROUGE"), references, ROUGE, measures.stemmer).items():
                values[kind] = triples[:, 2]
                values |= {f"{kind}_{part}": triples[:, column] for column, part in enumerate(PARTS)}
        if measures.similarity:
            values[SIMILARITY] = measures.similarity.scores(texts, references)
        for metric in measures.own:
            values[metric.name] = np.array(
                [
                    metric.value(text, self.references[number], f"{self.sources[number]}, model {self.name}")
                    for text, number in zip(self.bar(texts, metric.name), owners, strict=True)
                ]
            )
        if "bleu" in measures.names:
            corpora["bleu"] = Bleu.count(self.bar(texts, "BLEU"), references)
        if "chrf" in measures.names:
            corpora["chrf"] = Chrf.count(self.bar(texts, "chrF"), references)
        return Scores(values, corpora)

    def bar(self, texts: Sequence[str], what: str) -> Iterable[str]:
        """Return texts behind a progress bar, which only a terminal shows."""
        bar: Iterable[str] = tqdm(texts, desc=f"{self.name}, {what}", unit="answer", leave=False, disable=None)
        return bar

    def form(self, answer: str) -> str | None:
        """Return the part of an answer that counts, simplified; None where the expression finds none."""
        final = final_answer(answer, self.measures.regex)
        return None if self.measures.regex and not final else normalise(final, self.measures.normaliser)

    def statistics(self, several: Sequence[str], pass_at: Sequence[int]) -> dict[str, Statistic]:
        """Return the model's figures as statistics of questions.

        Args:
            several: some of `SEVERAL`: the mean over a question's answers, which has the plain name; the best of them;
                the one that most of them agree on; all of them joined.
            pass_at: the k of pass@k; those of which no question has as many answers are left out.

        Raises:
            InputError: some questions have k answers, and others not.
        """
        figures: dict[str, dict[str, Statistic]] = {}
        for how in several:
            for name, statistic in self.combined(how):
                figures.setdefault(name, {})[name if how == "mean" else f"{name} {how}"] = statistic
        flat = {name: statistic for by_way in figures.values() for name, statistic in by_way.items()}
        for k in pass_at:
            if self.counts.max() < k:
                continue
            if self.counts.min() < k:
                row = int(np.argmin(self.counts))
                raise InputError(
                    f"--pass_at {k} needs {k} answers to every question: {self.sources[row]} has {self.counts[row]} of "
                    f"{self.name}; give a smaller number, or more answers"
                )
            for name, values in self.scores.values.items():
                is_own = any(metric.name == name for metric in self.measures.own)
                if name == "exact_match" or (is_own and set(values.tolist()) <= {0.0, 1.0}):
                    right = np.add.reduceat(values, self.starts)
                    rates = [pass_rate(int(n), int(c), k) for n, c in zip(self.counts, right, strict=True)]
                    flat[f"pass@{k} {name}" if is_own else f"pass@{k}"] = mean_of(np.array(rates))
        return flat

    def combined(self, how: str) -> Iterator[tuple[str, Statistic]]:
        """Yield name and statistic of each figure, of a question's answers combined in one of the ways `SEVERAL`."""
        scores, chosen = self.scores, np.arange(len(self.answers))
        if how == "vote":
            chosen = self.elected()
        elif how == "concatenate":
            scores = self.scored([["\n".join(texts)] for texts in self.answers])
        for name, values in scores.values.items():
            if how == "mean":
                yield name, mean_of(np.add.reduceat(values, self.starts) / self.counts)
            elif how == "best":
                kind, _, part = name.partition("_")
                ranking = scores.values[kind] if kind in ROUGE and part in PARTS else values
                yield name, mean_of(values[self.best(ranking)])
            else:
                yield name, mean_of(values[chosen])
        for name, corpus in scores.corpora.items():
            if how == "mean":  # all answers are the corpus
                yield name, type(corpus)(np.add.reduceat(corpus.counts, self.starts, axis=0), corpus.each).score
            else:
                rows = self.best(corpus.each) if how == "best" else chosen
                yield name, type(corpus)(corpus.counts[rows], corpus.each[rows]).score

    def best(self, values: np.ndarray) -> np.ndarray:
        """Return the number of each question's answer with the highest value [N]; the first of equals."""
        pairs = zip(self.starts, self.counts, strict=True)
        return np.array([start + int(np.argmax(values[start : start + count])) for start, count in pairs])

    def elected(self) -> np.ndarray:
        """Return the number of each question's answer that most of its answers agree on [N]; the first of equals.

        Answers agree if their parts that count are equal. Those without such a part have no vote.
        """
        chosen = []
        for start, texts in zip(self.starts, self.answers, strict=True):
            forms = [self.form(text) for text in texts]
            votes = Counter(form for form in forms if form is not None)
            chosen.append(start + (forms.index(votes.most_common(1)[0][0]) if votes else 0))
        return np.array(chosen)


def pass_rate(num_answers: int, num_right: int, k: int) -> float:
    """Return the unbiased estimate of pass@k, the probability that one of k answers is right.

    With n answers of which c are right it is 1 - C(n - c, k) / C(n, k): the share of the sets of k among the n answers
    that hold a right one (Chen et al. 2021, Evaluating Large Language Models Trained on Code, equation 1).
    """
    return 1.0 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)
