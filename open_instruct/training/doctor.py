"""The loss doctor: cheap checks at the start, at steps and at evaluations.

Each finding names what was seen, the likely cause, and what to try. Thresholds are set so that runs with the recipes
trigger none (`tests/test_doctor.py`): the doctor prefers a missed problem to a false alarm.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from statistics import fmean, median

from open_instruct.data.texts import plain
from open_instruct.ranking import finite_or_inf
from open_instruct.training.state import History

MAX_CUT = 0.05  # share of the conversations that may be cut or dropped without a finding


@dataclass(frozen=True)
class Finding:
    """One diagnosis; each `name` is reported once in a run."""

    name: str
    seen: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        return f"doctor: {self.seen}. Likely cause: {self.cause}. Try {self.remedy}"


@dataclass(frozen=True)
class RunInfo:
    """Facts of a run that are known before its first step."""

    learning_rate: float
    num_steps: int
    warmup_steps: int
    clip_grad_norm: float  # bound of the L2 norm; none where not positive
    labelled_share: float  # share of the training tokens that are labelled
    num_read: int = 0  # conversations of the training data
    num_truncated: int = 0  # of these, longer than max_length
    num_skipped: int = 0  # of these, dropped because no label is left
    max_length: int = 0  # tokens kept of a conversation
    trains_prompt_directly: bool = False  # the virtual tokens' own numbers are trained (prompt tuning)
    has_network: bool = False  # a network computes the virtual tokens (P-tuning)
    embedding_std: float = math.nan  # standard deviation of the entries of the token embeddings
    vocabulary_norm: float = math.nan  # median length of a token's embedding


@dataclass
class Doctor:
    """Watches one run. Every public method returns the new findings, and adds its measurements to the history."""

    info: RunInfo
    history: History

    @property
    def window(self) -> int:
        """Steps over which training losses are averaged."""
        return max(5, self.info.num_steps // 20)

    def _new(self, *findings: Finding | None) -> list[Finding]:
        fresh = [finding for finding in findings if finding and finding.name not in self.history.reported]
        self.history.reported += dict.fromkeys(finding.name for finding in fresh)
        return fresh

    def before(self) -> list[Finding]:
        """Check the data and the hyperparameters alone."""
        return self._new(self._labels(), self._cut(), self._reach())

    def first(self, base: float, initial: float) -> list[Finding]:
        """Check the start.

        Args:
            base: held-out loss of the base model, in nats per labelled token.
            initial: held-out loss at step 0.
        """
        self.history.base, self.history.initial = base, initial
        return self._new(self._start())

    def step(self, loss: float, grad_norm: float) -> list[Finding]:
        """Check one step's training loss and its gradient norm before clipping."""
        self.history.losses.append(loss)
        self.history.norms.append(grad_norm)
        return self._new(self._too_high(), self._clipped())

    def evaluation(self, step: int, loss: float, prompt_norm: float = math.nan) -> list[Finding]:
        """Check a held-out loss after `step` steps, and the virtual tokens' median length then."""
        self.history.evaluations.append((step, loss))
        findings = self._new(self._drift(prompt_norm, loss), self._order(), self._gap(), self._worse(loss))
        findings += self._new(self._too_low(step, loss), self._above_base(step, loss))
        return findings + self._new(*self._rising_sources())

    def _labels(self) -> Finding | None:
        share = self.info.labelled_share
        if share >= 0.01:
            return None
        return Finding(
            "labels",
            f"only {share:.2%} of the training tokens are labelled",
            "the chat template assigns few tokens to the assistant, or --max_seq_length cuts the answers off",
            "a larger --max_seq_length, or another --chat_template_name",
        )

    def _cut(self) -> Finding | None:
        p = self.info
        if max(p.num_truncated, p.num_skipped) <= MAX_CUT * p.num_read:
            return None
        return Finding(
            "cut",
            f"of {p.num_read:,} conversations {p.num_truncated:,} ({p.num_truncated / p.num_read:.0%}) are longer than "
            f"{p.max_length:,} tokens and were cut, and {p.num_skipped:,} ({p.num_skipped / p.num_read:.0%}) were "
            "dropped, as no label was left",
            "--max_seq_length, or the model's context, is shorter than the data, or rows have no answer",
            "a larger --max_seq_length, fewer virtual tokens, a base with a longer context, or shorter conversations",
        )

    def _reach(self) -> Finding | None:
        """Adam moves an entry by about the rate in each step at most; a schedule that falls to zero halves the sum."""
        p = self.info
        reach = p.learning_rate * p.num_steps / 2
        if not p.trains_prompt_directly or p.num_steps < 10 or not reach < 0.1 * p.embedding_std:
            return None
        return Finding(
            "rate too low",
            f"at learning rate {p.learning_rate:.2g}, {p.num_steps} steps move an entry of the soft prompt by at most "
            f"{reach:.2g}, and the standard deviation of the embeddings is {p.embedding_std:.2g}",
            "the learning rate suits weights, not embeddings",
            f"--learning_rate {0.3 * p.embedding_std:.2g}, or drop --learning_rate to use the recipe's",
        )

    def _start(self) -> Finding | None:
        p = self.info
        ratio = self.history.prompt_norm / p.vocabulary_norm
        if not ((ratio > 3 or ratio < 1 / 3) and self.history.initial > 1.02 * self.history.base):
            return None
        return Finding(
            "start off the embeddings",
            f"before training the held-out loss is {self.history.initial:.3f}, against {self.history.base:.3f} of the "
            f"base model, and the virtual tokens are {ratio:.2g} times as long as the vocabulary's",
            "the random start is far from the embeddings of real tokens",
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
            f"the training loss rose from {best:.3f} to {recent:.3f} (means of {size} steps), above its first values, "
            f"and the gradient norm went from {calm:.2g} to {wild:.2g}",
            f"the learning rate {self.info.learning_rate:.2g} is too high",
            f"--learning_rate {self.info.learning_rate / 10:.2g}",
        )

    def _worse(self, loss: float) -> Finding | None:
        if not loss > 1.3 * self.history.initial + 0.1:
            return None
        return Finding(
            "rate too high",
            f"the held-out loss rose from {self.history.initial:.3f} at the start to {loss:.3f}",
            f"the learning rate {self.info.learning_rate:.2g} is too high",
            f"--learning_rate {self.info.learning_rate / 10:.2g}, or drop --learning_rate to use the recipe's",
        )

    def _clipped(self) -> Finding | None:
        bound, last = self.info.clip_grad_norm, self.history.norms[-50:]
        if bound <= 0 or len(last) < 50 or min(last) < 30 * bound:
            return None
        return Finding(
            "clipped",
            f"the gradient was clipped to {bound:g} in each of the last 50 steps (median norm {median(last):.3g})",
            "the bound is far below the usual gradient norm of this method and model, so differences in size are lost",
            f"--clip_grad_norm {median(last):.2g}, or -1 for no clipping",
        )

    def _drift(self, prompt_norm: float, loss: float) -> Finding | None:
        """Report virtual tokens that have grown long.

        Some growth does no harm, and the output of a network may have any length. In these cases only a worse held-out
        loss is reported.
        """
        ratio = prompt_norm / self.info.vocabulary_norm
        harmless = loss < self.history.base and loss < 1.02 * min(value for _, value in self.history.evaluations)
        if harmless and (ratio < 100 or self.info.has_network):
            return None
        if not ratio > max(10.0, 3 * self.history.prompt_norm / self.info.vocabulary_norm):
            return None
        return Finding(
            "drift",
            f"the virtual tokens have become {ratio:.2g} times as long as the vocabulary's, and the held-out loss is "
            f"{loss:.3f}",
            "the learning rate is high for embeddings, and no weight decay limits them",
            "--weight_decay 0.01, or drop --learning_rate to use the recipe's",
        )

    def _order(self) -> Finding | None:
        """A rising training loss with a falling held-out loss means that the data changes, not that training fails."""
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
            f"the training loss rose from {earlier:.3f} to {recent:.3f} while the held-out loss fell from {old:.3f} to "
            f"{new:.3f}",
            "the examples are ordered by source, and later sources are harder",
            "shuffling the data, with another --seed or sample_subsets.py",
        )

    def _gap(self) -> Finding | None:
        best = min(loss for _, loss in self.history.evaluations)
        now = self.history.evaluations[-1][1]
        trained = fmean(self.history.losses[-self.window :]) if self.history.losses else math.nan
        if not (now > 1.1 * best + 0.02 and trained < 0.5 * now):
            return None
        return Finding(
            "gap",
            f"the held-out loss rose from {best:.3f} to {now:.3f}, and the training loss is {trained:.3f}",
            "the model memorises the training examples",
            "fewer --num_train_epochs, fewer --max_train_steps, or more data",
        )

    def _rising_sources(self) -> list[Finding]:
        """Name each source whose held-out loss rose while that of all rows fell."""
        totals = {0: self.history.initial, **dict(self.history.evaluations)}
        findings = []
        for name, now in self.history.by_source[-1][1].items() if self.history.by_source else ():
            measured = [(losses[name], step) for step, losses in self.history.by_source if name in losses]
            lowest, then = min(measured, key=lambda item: finite_or_inf(item[0]))
            last = self.history.by_source[-1][0]
            if not (now > 1.1 * lowest + 0.02 and totals[last] < 0.98 * totals[then]):
                continue
            findings.append(
                Finding(
                    f"source {name}",
                    f"the held-out loss of the source {plain(name)} rose from {lowest:.3f} after step {then} to "
                    f"{now:.3f}, while that of all rows fell from {totals[then]:.3f} to {totals[last]:.3f}",
                    "what the other sources teach is wrong for this one, or it is rare among the training rows",
                    f"--source_weights {shlex.quote(plain(name))}=2, or fewer rows of the other sources",
                )
            )
        return findings

    def _too_low(self, step: int, loss: float) -> Finding | None:
        done = step / self.info.num_steps
        # From the best evaluation: a gain that was lost again is no sign of a low rate.
        gain = self.history.initial - min(value for _, value in self.history.evaluations)
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
            f"after {done:.0%} of the steps the held-out loss has fallen by {gain:.4f}, which makes "
            f"{gain / done:.4f} for the full run",
            f"the learning rate {self.info.learning_rate:.2g} is too low for {self.info.num_steps} steps",
            f"--learning_rate {10 * self.info.learning_rate:.2g}, or drop --learning_rate to use the recipe's",
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
            f"after the warm-up and half of the steps the held-out loss {loss:.3f} is not below the base model's "
            f"{self.history.base:.3f}",
            "there are too few steps for this method, or the learning rate does not fit",
            f"--max_train_steps {4 * self.info.num_steps}, or another --learning_rate",
        )
