"""Everything that a checkpoint holds besides the optimizer: counters, losses, best parameters, the doctor's history."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from open_instruct.ranking import finite_or_inf
from open_instruct.training.sharding import gather_full, trained_parameters


@dataclass
class History:
    """Measurements that the loss doctor has seen. Losses are in nats per labelled token."""

    base: float = math.nan  # held-out loss of the base model
    initial: float = math.nan  # held-out loss at step 0
    prompt_norm: float = math.nan  # median length of a virtual token at step 0; nan where there are no embeddings
    losses: list[float] = field(default_factory=list)  # training loss of each applied step
    norms: list[float] = field(default_factory=list)  # gradient norm of each, before clipping
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out loss)
    reported: list[str] = field(default_factory=list)  # names of findings
    by_source: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (step, held-out loss of each source)
    base_by_source: dict[str, float] = field(default_factory=dict)  # held-out loss of the base model

    @property
    def num_without_better(self) -> int:
        """Evaluations after the one with the lowest loss; one that is not finite is never the lowest."""
        lowest, count = math.inf, 0
        for _, loss in self.evaluations:
            is_lower = finite_or_inf(loss) < lowest
            lowest, count = (loss, 0) if is_lower else (lowest, count + 1)
        return count


def median_norm(vectors: torch.Tensor | None) -> float:
    """Return the median length of vectors [P, D]; nan where there are none."""
    return math.nan if vectors is None else vectors.norm(dim=1).median().item()


@dataclass
class TrainState:
    """Progress of a run. All of it but `best` is in a checkpoint's state.json."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    label_tokens: int = 0
    train_seconds: float = 0.0  # steps alone
    wall_seconds: float = 0.0  # evaluations and saves included
    base_eval_loss: float | None = None
    initial_eval_loss: float | None = None
    final_eval_loss: float | None = None
    best_eval_loss: float | None = None  # after a step; not kept with --keep_best False
    best_step: int | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)  # of the loss doctor
    identity: Mapping[str, Any] = field(default_factory=dict)  # values that a resumed run must share
    history: History = field(default_factory=History)
    # Parameters of the lowest held-out loss, on the main process's CPU; empty on the others. They are saved if the run
    # memorises its examples afterwards.
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def advance(self, num_examples: int, tokens: int, label_tokens: int, seconds: float) -> None:
        """Count one more step."""
        self.step += 1
        self.examples += num_examples
        self.tokens += tokens
        self.label_tokens += label_tokens
        self.train_seconds += seconds

    def record_eval(self, loss: float, by_source: dict[str, float]) -> None:
        """Record a held-out loss. The first is that of the start, and of the base too where no base was measured."""
        if by_source:
            self.history.by_source.append((self.step, by_source))
        if self.step == 0:
            self.initial_eval_loss = loss
            self.base_eval_loss = loss if self.base_eval_loss is None else self.base_eval_loss
            self.history.base_by_source = self.history.base_by_source or by_source
        self.final_eval_loss = loss

    def keep_if_best(self, loss: float, model: nn.Module, accelerator: Accelerator) -> None:
        """Copy the parameters if this held-out loss is the lowest after a step. Every process calls this.

        A loss that is not finite is never the lowest.
        """
        if self.step and finite_or_inf(loss) < finite_or_inf(self.best_eval_loss):
            self.best_eval_loss, self.best_step = loss, self.step
            gathered = gather_full(trained_parameters(model), accelerator)
            self.best = {name: tensor.clone() for name, tensor in gathered.items()}

    @torch.no_grad()
    def exchange_best(self, model: nn.Module) -> None:
        """Exchange the parameters of a model that is not sharded for the best ones; once more, and they are back."""
        for name, parameter in trained_parameters(model).items():
            current = parameter.detach().to(self.best[name].device, copy=True)
            parameter.copy_(self.best[name])
            self.best[name] = current

    @property
    def best_is_earlier(self) -> bool:
        """Whether the parameters to save are not the last ones."""
        return self.best_step is not None and self.best_step < self.step

    @property
    def saved_step(self) -> int:
        """Step whose parameters are saved."""
        return self.best_step if self.best_step is not None and self.best_is_earlier else self.step

    def best_text(self) -> str:
        """Return a line that explains why the saved parameters are not the last ones."""
        return (
            f"the held-out loss was lowest after step {self.best_step} ({self.best_eval_loss:.4f}; at the end it is "
            f"{self.final_eval_loss:.4f}): the parameters of that step are saved (--keep_best False saves the last)"
        )

    def summary(self) -> dict[str, Any]:
        """Return the entries of summary.json that survive a resumption. The final loss is the saved parameters'."""
        return {
            "base_eval_loss": self.base_eval_loss,
            "initial_eval_loss": self.initial_eval_loss,
            "final_eval_loss": self.best_eval_loss if self.best_is_earlier else self.final_eval_loss,
            "last_eval_loss": self.final_eval_loss,
            "saved_step": self.saved_step,
            "findings": self.findings,
            "steps": self.step,
            "examples": self.examples,
            "tokens": self.tokens,
            "wall_seconds": round(self.wall_seconds, 2),
            "tokens_per_second": round(self.tokens / self.train_seconds, 1) if self.train_seconds else None,
        }
