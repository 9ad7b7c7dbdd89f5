"""The loss doctor: cheap checks at the start, at steps and at evaluations, each of which says what was seen, why, and what to try.

Thresholds are set so that runs with the recipes trigger none (`tests/test_doctor.py`): the doctor would rather say nothing than be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median

from open_instruct.training.state import History


@dataclass(frozen=True)
class Finding:
    """One diagnosis; each `name` is reported once in a run."""

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        """One line."""
        return f"doctor: {self.seen}; likely because {self.cause}. Try {self.remedy}"


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first step."""

    learning_rate: float
    num_steps: int
    warmup_steps: int
    clip_grad_norm: float  # not positive: none
    labelled_share: float  # of the training tokens
    trains_prompt_directly: bool = False  # the virtual tokens' own numbers are trained (prompt tuning)
    has_network: bool = False  # a network computes the virtual tokens (P-tuning)
    embedding_std: float = math.nan  # of the vocabulary's entries
    vocabulary_norm: float = math.nan  # median length of a token's embedding


@dataclass
class Doctor:
    """Watches one run. Every method returns what it found just now, and adds what it saw to the history."""

    info: RunInfo
    history: History

    @property
    def window(self) -> int:
        """Steps over which training losses are averaged."""
        return max(5, self.info.num_steps // 20)

    def _new(self, *found: Finding | None) -> list[Finding]:
        fresh = [finding for finding in found if finding and finding.name not in self.history.reported]
        self.history.reported += dict.fromkeys(finding.name for finding in fresh)
        return fresh

    def before(self) -> list[Finding]:
        """Check the data and the hyperparameters alone."""
        return self._new(self._labels(), self._reach())

    def first(self, base: float, initial: float, prompt_norm: float = math.nan) -> list[Finding]:
        """Check the start.

        Args:
            base: held-out loss of the base model, in nats per labelled token.
            initial: held-out loss at step 0.
            prompt_norm: median length of a virtual token then; nan where there are no embeddings.
        """
        self.history.base, self.history.initial, self.history.prompt_norm = base, initial, prompt_norm
        return self._new(self._start())

    def step(self, loss: float, grad_norm: float) -> list[Finding]:
        """Check one step's training loss and its gradient norm before clipping."""
        self.history.losses.append(loss)
        self.history.norms.append(grad_norm)
        return self._new(self._too_high(), self._clipped())

    def evaluation(self, step: int, loss: float, prompt_norm: float = math.nan) -> list[Finding]:
        """Check a held-out loss after `step` steps, and the virtual tokens' median length then."""
        self.history.evaluations.append((step, loss))
        found = self._new(self._drift(prompt_norm, loss), self._order(), self._gap(), self._worse(loss))
        return found + self._new(self._too_low(step, loss), self._above_base(step, loss))

    def _labels(self) -> Finding | None:
        share = self.info.labelled_share
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
        p = self.info
        reach = p.learning_rate * p.num_steps / 2
        if not p.trains_prompt_directly or p.num_steps < 10 or not reach < 0.1 * p.embedding_std:
            return None
        return Finding(
            "rate too low",
            f"at learning rate {p.learning_rate:.2g}, {p.num_steps} steps move a number of the soft prompt by at most {reach:.2g}, and "
            f"embeddings spread by {p.embedding_std:.2g}",
            "the rate is made for weights, not for embeddings",
            f"--learning_rate {0.3 * p.embedding_std:.2g}, or no --learning_rate at all: the recipe's",
        )

    def _start(self) -> Finding | None:
        p = self.info
        ratio = self.history.prompt_norm / p.vocabulary_norm
        if not ((ratio > 3 or ratio < 1 / 3) and self.history.initial > 1.02 * self.history.base):
            return None
        return Finding(
            "start off the embeddings",
            f"the first held-out loss is {self.history.initial:.3f} against the base's {self.history.base:.3f}, and virtual tokens are {ratio:.2g} times "
            "as long as the vocabulary's",
            "the random start is nowhere near real tokens' embeddings",
            "--prompt_tuning_init sample_vocab, or text with --prompt_tuning_init_text",
        )

    def _too_high(self) -> Finding | None:
        size = self.window
        if len(self.history.losses) < 3 * size or set(self.history.reported) & {
            "start off the embeddings",
            "rate too low",
        }:
            return None
        means = [fmean(self.history.losses[i : i + size]) for i in range(0, len(self.history.losses) - size + 1, size)]
        recent, best = fmean(self.history.losses[-size:]), min(means)
        if not recent > 1.5 * best + 0.1 or recent < max(self.history.losses[:size]):
            return None
        calm, wild = median(self.history.norms[:size]), median(self.history.norms[-size:])
        return Finding(
            "rate too high",
            f"the training loss rose from {best:.3f} to {recent:.3f} (mean of {size} steps), above where it began; gradient norms went "
            f"from {calm:.2g} to {wild:.2g}",
            f"the learning rate {self.info.learning_rate:.2g} overshoots",
            f"--learning_rate {self.info.learning_rate / 10:.2g}",
        )

    def _worse(self, loss: float) -> Finding | None:
        if not loss > 1.3 * self.history.initial + 0.1:
            return None
        return Finding(
            "rate too high",
            f"the held-out loss rose from {self.history.initial:.3f} at the start to {loss:.3f}",
            f"the learning rate {self.info.learning_rate:.2g} overshoots",
            f"--learning_rate {self.info.learning_rate / 10:.2g}, or no --learning_rate at all: the recipe's",
        )

    def _clipped(self) -> Finding | None:
        bound, last = self.info.clip_grad_norm, self.history.norms[-50:]
        if bound <= 0 or len(last) < 50 or min(last) < 30 * bound:
            return None
        return Finding(
            "clipped",
            f"the gradient was cut to {bound:g} at each of the last 50 steps, from {median(last):.3g} in the middle",
            "the bound is far below what gradients of this method and model are, so their sizes are lost",
            f"--clip_grad_norm {median(last):.2g}, or -1 for none",
        )

    def _drift(self, prompt_norm: float, loss: float) -> Finding | None:
        """Report virtual tokens that have grown long.

        Some length does no harm, and a network's output may have any: then it is reported only where the held-out loss
        has suffered.
        """
        ratio = prompt_norm / self.info.vocabulary_norm
        harmless = loss < self.history.base and loss < 1.02 * min(value for _, value in self.history.evaluations)
        if harmless and (ratio < 100 or self.info.has_network):
            return None
        if not ratio > max(10.0, 3 * self.history.prompt_norm / self.info.vocabulary_norm):
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
        if len(self.history.evaluations) < 3 or len(self.history.losses) < 2 * size:
            return None
        (before, old), (_, new) = self.history.evaluations[-2:]
        if before < size or len(self.history.losses) - before < size:
            return None
        earlier, recent = fmean(self.history.losses[before - size : before]), fmean(self.history.losses[-size:])
        if not (recent > 1.25 * earlier + 0.1 and new < 0.95 * old):
            return None
        return Finding(
            "order",
            f"the training loss rose from {earlier:.3f} to {recent:.3f} while the held-out loss fell from {old:.3f} to {new:.3f}",
            "the examples come in the order of their sources, so later ones are harder",
            "shuffled data: another --seed, or sample_subsets.py",
        )

    def _gap(self) -> Finding | None:
        best = min(loss for _, loss in self.history.evaluations)
        now, trained = (
            self.history.evaluations[-1][1],
            fmean(self.history.losses[-self.window :]) if self.history.losses else math.nan,
        )
        if not (now > 1.1 * best + 0.02 and trained < 0.5 * now):
            return None
        return Finding(
            "gap",
            f"the held-out loss rose from {best:.3f} to {now:.3f}, and the training loss is {trained:.3f}",
            "the adapter learns the training examples by heart",
            "fewer --num_train_epochs or --max_train_steps, or more data",
        )

    def _too_low(self, step: int, loss: float) -> Finding | None:
        done = step / self.info.num_steps
        gain = self.history.initial - min(
            value for _, value in self.history.evaluations
        )  # what was lost again is no sign of a low rate
        if (
            done < 0.3
            or step < 20
            or set(self.history.reported) & {"start off the embeddings", "rate too high", "gap"}
            or loss < 0.98 * self.history.base
        ):
            return None
        if not 0 <= gain / done < 0.02 * self.history.initial:
            return None
        return Finding(
            "rate too low",
            f"after {done:.0%} of the steps the held-out loss has fallen by {gain:.4f}, and would fall by {gain / done:.4f} in all",
            f"the learning rate {self.info.learning_rate:.2g} is too low for {self.info.num_steps} steps",
            f"--learning_rate {10 * self.info.learning_rate:.2g}, or no --learning_rate at all: the recipe's",
        )

    def _above_base(self, step: int, loss: float) -> Finding | None:
        if (
            step <= self.info.warmup_steps
            or step < 0.5 * self.info.num_steps
            or step < 20
            or set(self.history.reported)
            or not loss >= self.history.base
        ):
            return None
        return Finding(
            "above the base",
            f"the held-out loss {loss:.3f} is not below the base model's {self.history.base:.3f}, after the warm-up and half of the steps",
            "too few steps for this method, or a rate that does not fit",
            f"--max_train_steps {4 * self.info.num_steps}, or another --learning_rate",
        )
