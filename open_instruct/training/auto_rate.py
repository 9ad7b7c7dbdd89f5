"""A learning-rate range test: short trainings from the same start, each at another rate, on the run's own first examples.

Smith 2017 raises the rate during one training and looks where the loss falls fastest. A soft prompt's loss falls steeply at the start
whatever the rate, which hides the optimum; so every rate begins anew here, sees the same examples, and is judged on others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from open_instruct.data.collate import Batching, to_device
from open_instruct.data.dataset import Examples
from open_instruct.data.plan import Plan
from open_instruct.training.probing import first_examples, mean_loss, micro_batches

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the recipe's rate
STEPS = 8  # of each short training
PROBES = 2  # steps' examples on which each is judged
MOST_EXAMPLES = 16  # of a step


@dataclass(frozen=True)
class RangeTest:
    """What was tried and chosen. Losses are nats per labelled token on the same unseen micro-batches."""

    rates: list[float]
    losses: list[float]  # nan or infinite where a training broke down
    before: float  # without any training
    chosen: float
    why: str


def range_test(
    accelerator: Any,
    model: torch.nn.Module,
    examples: Examples,
    plan: Plan,
    batching: Batching,
    recipe_rate: float,
    clip_grad_norm: float,
    seed: int,
) -> RangeTest:
    """Try rates around the recipe's. Parameters are as before afterwards, bit for bit.

    Args:
        accelerator: for device and precision.
        model: a `TrainingModel`, not prepared yet.
        examples: training examples.
        plan: of the run, whose first steps are used.
        batching: how micro-batches are made.
        recipe_rate: the middle of what is tried.
        clip_grad_norm: bound of the gradient's norm; none where not positive.
        seed: of dropout.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in parameters]
    was_training = model.training
    size = min(plan.examples_per_step, MOST_EXAMPLES)
    indices = first_examples(plan, (STEPS + PROBES) * size)
    probes = micro_batches(batching, examples, indices[: PROBES * size])
    steps = [indices[start : start + size] for start in range(PROBES * size, len(indices), size)] or [indices]
    training = [(micro_batches(batching, examples, step), int(examples.label_counts[step].sum())) for step in steps]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    before = mean_loss(accelerator, model, probes)
    rates, losses = [factor * recipe_rate for factor in FACTORS], []
    try:
        for rate in rates:
            restore()
            train_shortly(accelerator, model, parameters, training, rate, clip_grad_norm, seed)
            losses.append(mean_loss(accelerator, model, probes))
    finally:
        restore()
        model.train(was_training)
    chosen, why = choose(rates, losses, before, recipe_rate)
    return RangeTest(rates, losses, before, chosen, why)


def train_shortly(
    accelerator: Any,
    model: torch.nn.Module,
    parameters: Sequence[torch.nn.Parameter],
    steps: Sequence[tuple[list[dict[str, Any]], int]],
    rate: float,
    clip_grad_norm: float,
    seed: int,
) -> None:
    """A step on each (micro-batches, number of their labelled tokens), the rate falling to zero as at the end of a run."""
    model.train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for number, (batches, label_tokens) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / len(steps))
        for batch in batches:
            with accelerator.autocast():
                loss, _ = model(**to_device(batch, accelerator.device))
            (loss / label_tokens).backward()
        if clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def choose(rates: Sequence[float], losses: Sequence[float], before: float, recipe_rate: float) -> tuple[float, str]:
    """The rate with the lowest loss, refined by the parabola through it and its neighbours in log rate.

    Returns:
        (rate, reason).
    """
    usable = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = min(range(len(rates)), key=usable.__getitem__)
    if not usable[best] < before:
        return recipe_rate, f"no rate brought the loss below {before:.4f} in {STEPS} steps, so the recipe's is kept"
    chosen, how = rates[best], "the lowest loss"
    if 0 < best < len(rates) - 1 and math.isfinite(usable[best - 1]) and math.isfinite(usable[best + 1]):
        x = [math.log(rate) for rate in rates[best - 1 : best + 2]]
        y = usable[best - 1 : best + 2]
        left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        curvature = (right - left) / (x[2] - x[0])
        if curvature > 0:
            middle = (x[0] + x[1]) / 2 - left / (2 * curvature)
            chosen, how = (
                math.exp(min(max(middle, x[0]), x[2])),
                "the lowest point of the parabola through the three best",
            )
    chosen = float(f"{chosen:.3g}")
    return chosen, f"{how}: {usable[best]:.4f} after {STEPS} steps at {rates[best]:.3g}, from {before:.4f}"
