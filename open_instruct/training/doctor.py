"""The loss doctor: cheap checks at the start, at steps and at evaluations, each of which says what was seen, why, and what to try.

Thresholds are set so that runs with the recipes trigger none (`tests/test_doctor.py`): the doctor would rather say nothing than be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median


@dataclass(frozen=True)
class Finding:
    """One diagnosis; `name` is said once in a run."""

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        """One line."""
        return f"doctor: {self.seen}; likely because {self.cause}. Try {self.remedy}"


@dataclass(frozen=True)
class Patient:
    """What is known of a run before its first step."""

    method: str
    learning_rate: float
    num_steps: int
    warmup_steps: int
    clip_grad_norm: float  # not positive: none
    labelled_share: float  # of the training tokens
    embedding_std: float = math.nan  # of the vocabulary's entries
    vocabulary_norm: float = math.nan  # median length of a token's embedding
    prompt_norm: float = (
        math.nan
    )  # median length of a virtual token at the start; nan where there is none of embeddings


@dataclass
class Doctor:
    """Watches one run. Every method returns what it found just now."""

    patient: Patient
    base: float = math.nan
    initial: float = math.nan
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def remember(self, base: float | None, initial: float | None, said: list[str]) -> None:
        """What a run that is resumed has measured and heard before."""
        self.base = math.nan if base is None else base
        self.initial = math.nan if initial is None else initial
        self.said |= set(said)

    @property
    def window(self) -> int:
        """Steps over which training losses are averaged."""
        return max(5, self.patient.num_steps // 20)

    def _new(self, *found: Finding | None) -> list[Finding]:
        fresh = [finding for finding in found if finding and finding.name not in self.said]
        self.said |= {finding.name for finding in fresh}
        return fresh

    def before(self) -> list[Finding]:
        """Of the data and the hyperparameters alone."""
        return self._new(self._labels(), self._reach())

    def first(self, base: float, initial: float) -> list[Finding]:
        """Of the held-out losses at step 0, in nats per labelled token: the base model's and the start's."""
        self.base, self.initial = base, initial
        return self._new(self._start())

    def step(self, loss: float, grad_norm: float) -> list[Finding]:
        """Of one step's training loss and gradient norm before clipping."""
        self.losses.append(loss)
        self.norms.append(grad_norm)
        return self._new(self._too_high(), self._clipped())

    def evaluation(self, step: int, loss: float, prompt_norm: float = math.nan) -> list[Finding]:
        """Of a held-out loss after `step` steps, and of the virtual tokens' median length then."""
        self.evaluations.append((step, loss))
        found = self._new(self._drift(prompt_norm, loss), self._order(), self._gap(), self._worse(loss))
        return found + self._new(self._too_low(step, loss), self._above_base(step, loss))

    def _labels(self) -> Finding | None:
        share = self.patient.labelled_share
        if share >= 0.01:
            return None
        return Finding(
            "labels",
            f"{share:.2%} of the training tokens are labelled",
            "the chat template marks little as the assistant's, or --max_seq_length cuts the answers away",
            "--max_seq_length with room for the answers, or another --chat_template_name",
        )

    def _reach(self) -> Finding | None:
        """Adam moves a number by at most its rate in a step; a schedule that falls to zero halves the sum."""
        p = self.patient
        reach = p.learning_rate * p.num_steps / 2
        if p.method != "prompt_tuning" or p.num_steps < 10 or not reach < 0.1 * p.embedding_std:
            return None
        return Finding(
            "rate too low",
            f"at learning rate {p.learning_rate:.2g}, {p.num_steps} steps move a number of the soft prompt by at most {reach:.2g}, and "
            f"embeddings spread by {p.embedding_std:.2g}",
            "the rate is made for weights, not for embeddings",
            f"--learning_rate {0.3 * p.embedding_std:.2g}, or no --learning_rate at all: the recipe's",
        )

    def _start(self) -> Finding | None:
        p = self.patient
        ratio = p.prompt_norm / p.vocabulary_norm
        if not ((ratio > 3 or ratio < 1 / 3) and self.initial > 1.02 * self.base):
            return None
        return Finding(
            "start off the embeddings",
            f"the first held-out loss is {self.initial:.3f} against the base's {self.base:.3f}, and virtual tokens are {ratio:.2g} times "
            "as long as the vocabulary's",
            "the random start is nowhere near real tokens' embeddings",
            "--prompt_tuning_init sample_vocab, or text with --prompt_tuning_init_text",
        )

    def _too_high(self) -> Finding | None:
        size = self.window
        if len(self.losses) < 3 * size or self.said & {"start off the embeddings", "rate too low"}:
            return None
        means = [fmean(self.losses[i : i + size]) for i in range(0, len(self.losses) - size + 1, size)]
        recent, best = fmean(self.losses[-size:]), min(means)
        if not recent > 1.5 * best + 0.1 or recent < max(self.losses[:size]):
            return None
        calm, wild = median(self.norms[:size]), median(self.norms[-size:])
        return Finding(
            "rate too high",
            f"the training loss rose from {best:.3f} to {recent:.3f} (mean of {size} steps), above where it began; gradient norms went "
            f"from {calm:.2g} to {wild:.2g}",
            f"the learning rate {self.patient.learning_rate:.2g} overshoots",
            f"--learning_rate {self.patient.learning_rate / 10:.2g}",
        )

    def _worse(self, loss: float) -> Finding | None:
        if not loss > 1.3 * self.initial + 0.1:
            return None
        return Finding(
            "rate too high",
            f"the held-out loss rose from {self.initial:.3f} at the start to {loss:.3f}",
            f"the learning rate {self.patient.learning_rate:.2g} overshoots",
            f"--learning_rate {self.patient.learning_rate / 10:.2g}, or no --learning_rate at all: the recipe's",
        )

    def _clipped(self) -> Finding | None:
        bound, last = self.patient.clip_grad_norm, self.norms[-50:]
        if bound <= 0 or len(last) < 50 or min(last) < 30 * bound:
            return None
        return Finding(
            "clipped",
            f"the gradient was cut to {bound:g} at each of the last 50 steps, from {median(last):.3g} in the middle",
            "the bound is far below what gradients of this method and model are, so their sizes are lost",
            f"--clip_grad_norm {median(last):.2g}, or -1 for none",
        )

    def _drift(self, prompt_norm: float, loss: float) -> Finding | None:
        """Some length does no harm, and a network's output is free in it: then it is said only where the held-out loss has suffered."""
        ratio = prompt_norm / self.patient.vocabulary_norm
        harmless = loss < self.base and loss < 1.02 * min(value for _, value in self.evaluations)
        if harmless and (ratio < 100 or self.patient.method == "p_tuning"):
            return None
        if not ratio > max(10.0, 3 * self.patient.prompt_norm / self.patient.vocabulary_norm):
            return None
        return Finding(
            "drift",
            f"virtual tokens have become {ratio:.2g} times as long as the vocabulary's, and the held-out loss is {loss:.3f}",
            "the rate is high for embeddings, and nothing holds them back",
            "no --learning_rate at all: the recipe's, or --weight_decay 0.01",
        )

    def _order(self) -> Finding | None:
        """Both at once mean that what is trained on changes, not that training fails."""
        size = self.window
        if len(self.evaluations) < 3 or len(self.losses) < 2 * size:
            return None
        (before, old), (_, new) = self.evaluations[-2:]
        if before < size or len(self.losses) - before < size:
            return None
        earlier, recent = fmean(self.losses[before - size : before]), fmean(self.losses[-size:])
        if not (recent > 1.25 * earlier + 0.1 and new < 0.95 * old):
            return None
        return Finding(
            "order",
            f"the training loss rose from {earlier:.3f} to {recent:.3f} while the held-out loss fell from {old:.3f} to {new:.3f}",
            "the examples come in the order of their sources, so later ones are harder",
            "shuffled data: another --seed, or sample_subsets.py",
        )

    def _gap(self) -> Finding | None:
        best = min(loss for _, loss in self.evaluations)
        now, trained = self.evaluations[-1][1], fmean(self.losses[-self.window :]) if self.losses else math.nan
        if not (now > 1.1 * best + 0.02 and trained < 0.5 * now):
            return None
        return Finding(
            "gap",
            f"the held-out loss rose from {best:.3f} to {now:.3f}, and the training loss is {trained:.3f}",
            "the adapter learns the training examples by heart",
            "fewer --num_train_epochs or --max_train_steps, or more data",
        )

    def _too_low(self, step: int, loss: float) -> Finding | None:
        done = step / self.patient.num_steps
        gain = self.initial - min(
            value for _, value in self.evaluations
        )  # what was lost again is no sign of a low rate
        if (
            done < 0.3
            or step < 20
            or self.said & {"start off the embeddings", "rate too high", "gap"}
            or loss < 0.98 * self.base
        ):
            return None
        if not 0 <= gain / done < 0.02 * self.initial:
            return None
        return Finding(
            "rate too low",
            f"after {done:.0%} of the steps the held-out loss has fallen by {gain:.4f}, and would fall by {gain / done:.4f} in all",
            f"the learning rate {self.patient.learning_rate:.2g} is too low for {self.patient.num_steps} steps",
            f"--learning_rate {10 * self.patient.learning_rate:.2g}, or no --learning_rate at all: the recipe's",
        )

    def _above_base(self, step: int, loss: float) -> Finding | None:
        if (
            step <= self.patient.warmup_steps
            or step < 0.5 * self.patient.num_steps
            or step < 20
            or self.said
            or not loss >= self.base
        ):
            return None
        return Finding(
            "above the base",
            f"the held-out loss {loss:.3f} is not below the base model's {self.base:.3f}, after the warm-up and half of the steps",
            "too few steps for this method, or a rate that does not fit",
            f"--max_train_steps {4 * self.patient.num_steps}, or another --learning_rate",
        )
