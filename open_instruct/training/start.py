"""Searches before the first step: for the start of a soft prompt, and for the learning rate.

Starts: the losses of random tokens as a soft prompt differ by a factor of ten and more, and draws with a low first loss
tend to have a low final loss (docs/experiments.md). So a text and 15 draws are compared, and the run starts from the
best.

Rates: Smith 2017 raises the rate during one training and looks where the loss falls fastest. A soft prompt's loss falls
steeply at the start whatever the rate, which hides the optimum. So here every rate starts afresh, trains on the same
examples, and is judged on others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from open_instruct.data.context import Context
from open_instruct.data.dataset import Examples
from open_instruct.data.packing import Batching, to_device
from open_instruct.data.plan import Plan
from open_instruct.errors import input_faults
from open_instruct.methods import Method
from open_instruct.model import context_starts
from open_instruct.model.distillation import DistilledModel
from open_instruct.model.evaluation_mode import evaluating
from open_instruct.model.precision import autocast
from open_instruct.model.tokens import context_places
from open_instruct.ranking import finite_or_inf
from open_instruct.training import engines, stored
from open_instruct.training.forward import Forward, switch_on

if TYPE_CHECKING:
    from open_instruct.training.checkpoint import Checkpoint
    from open_instruct.training.settings import Resolved

CANDIDATES = 16  # starts: the text and 15 draws
JUDGED_ON = 16  # examples on which starts are judged
ATTENDED_BY = 64  # examples whose attention to a context is measured

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the recipe's rate
STEPS = 8  # of each short training
PROBES = 2  # steps whose examples judge each training
MAX_STEP_EXAMPLES = 16


@dataclass(frozen=True)
class Starts:
    """Values of the soft prompt's parameter to choose from, none where the start stays as it is, and their origins."""

    values: Sequence[torch.Tensor] = ()
    origins: Sequence[str] = ()
    places: Sequence[Sequence[int]] = ()  # of their tokens in a context that is distilled


def init_candidates(
    method: Method,
    settings: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    context: Context | None = None,
) -> Starts:
    """Return the starts to choose from. A soft prompt that replaces a context starts from pieces of that."""
    init = getattr(settings, method.init_flag) if method.init_flag else None
    if context and init in ("text", "screened") and settings.prompt_tuning_init_text is None:
        count = CANDIDATES // 2 if init == "screened" else 1
        places = context_places(len(context.ids), settings.num_virtual_tokens, count)
        values = [method.start_of(model, [context.ids[place] for place in choice]) for choice in places]
        origins = ["the context's first tokens", *(f"pieces of the context, draw {i}" for i in range(1, count))]
        return Starts(values, origins, places if init == "screened" else ())
    if init != "screened":
        return Starts()
    values = method.init_candidates(model, tokenizer, settings, CANDIDATES)
    return Starts(values, ["the text", *(f"draw {i} of random tokens" for i in range(1, len(values)))])


def with_attended(
    starts: Starts, method: Method, accelerator: Accelerator, forward: Forward, examples: Examples, plan: Plan
) -> Starts:
    """Return starts and those that only the teacher of a distillation knows.

    These are the tokens of the context to which the first conversations attend most; for a prefix their keys and values
    within the context, and those of the other starts, too.

    Args:
        starts: result of `init_candidates`.
        method: the run's method.
        accelerator: joins the run's processes.
        forward: the run's forward pass, activated.
        examples: training examples.
        plan: the examples of each step.
    """
    model = forward.model
    if not starts.places or not isinstance(model, DistilledModel):
        return starts
    batches = collate_examples(forward.training, examples, first_examples(plan, ATTENDED_BY))
    with autocast(accelerator.device.type, model.causal.dtype):
        received = context_starts.received_attention(model, batches)
    count, values, origins = len(starts.places[0]), list(starts.values), list(starts.origins)
    attended = received.topk(min(count, len(received))).indices.sort().values.tolist()
    attended = (attended * count)[:count] if len(attended) < count else attended
    name = "the context's most attended tokens"
    if method.prompt_kind == "embeddings":
        return Starts(
            [*values, method.start_of(model.model, [model.context_ids[i] for i in attended])], [*origins, name]
        )
    if context_starts.is_movable(model.causal):
        for pairs, origin in zip(
            context_starts.keys_values_at(model, [*starts.places, attended]), [*starts.origins, name], strict=True
        ):
            start = method.start_of_keys(pairs)
            if start is not None:
                values.append(start)
                origins.append(f"{origin}, as they are within it")
    return Starts(values, origins)


def search_init(
    method: Method,
    starts: Starts,
    accelerator: Accelerator,
    forward: Forward,
    examples: Examples,
    plan: Plan,
) -> None:
    """Start from the candidate with the lowest loss on the run's first examples. Every process does the same.

    Args:
        method: the run's method.
        starts: what to choose from.
        accelerator: joins the run's processes.
        forward: the run's forward pass, activated.
        examples: training examples.
        plan: the examples of each step.
    """
    if not starts.values:
        return
    model, best = forward.model.model, 0
    if accelerator.is_main_process:
        losses = []
        batches = collate_examples(forward.training, examples, first_examples(plan, JUDGED_ON))
        for values in starts.values:
            method.set_init(model, values)
            losses.append(mean_loss(accelerator, forward.model, batches))
        best = min(range(len(losses)), key=lambda i: finite_or_inf(losses[i]))
        accelerator.print(
            f"soft prompt starts from {starts.origins[best]}: loss {losses[best]:.4f}, the lowest of {len(losses)} "
            f"starts ({starts.origins[0].removeprefix('the ')} {losses[0]:.4f}, highest {max(losses):.4f})"
        )
    method.set_init(model, starts.values[engines.broadcast(best)])


def search_rate(
    resolved: Resolved,
    saved: Checkpoint | None,
    accelerator: Accelerator,
    forward: Forward,
    examples: Examples,
    plan: Plan,
) -> tuple[Resolved, RangeTest | None]:
    """Choose the learning rate as --auto_lr asks. A resumed run keeps the rate that was chosen.

    The main process runs the range test and prints its result, which every process gets.
    """
    flags, recipe_rate = resolved.flags, resolved.optimizer.learning_rate
    if not flags.auto_lr or flags.dry_run:
        return resolved, None
    if saved:
        with input_faults(f"learning rate of checkpoint {saved.path}", "resume from another one"):
            rate = stored.typed(saved.state.identity["learning_rate"], float, "it")
            if not 0 < rate < math.inf:
                raise ValueError(f"it is {rate}")
            return resolved.with_learning_rate(rate), None
    switch_on(forward, flags.gradient_checkpointing, compile_layers=False)
    test = None
    if accelerator.is_main_process:
        test = range_test(
            accelerator,
            forward.model,
            partial(resolved.method.parameter_groups, forward.model, resolved.method_settings),
            examples,
            plan,
            forward.training,
            recipe_rate,
            resolved.optimizer.clip_grad_norm,
            flags.seed,
        )
    test = engines.broadcast(test)
    accelerator.print(f"auto_lr: learning rate {test.chosen:.3g} (recipe {recipe_rate:.3g}): {test.why}")
    return resolved.with_learning_rate(test.chosen), test


def first_examples(plan: Plan, num_examples: int) -> list[int]:
    """Return the indices of the first examples that a run trains on: the same on 1 or 8 processes."""
    indices: list[int] = []
    for step in range(plan.num_steps):
        indices += plan.examples(step).tolist()
        if len(indices) >= num_examples:
            break
    return indices[:num_examples]


def collate_examples(batching: Batching, examples: Examples, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Collate examples into as many micro-batches as they need."""
    rows = batching.micro_batches(indices, examples.lengths, 0, 1)
    return [batching.collate([examples[i] for i in row]) for row in rows]


@torch.no_grad()
def mean_loss(accelerator: Accelerator, model: torch.nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Return the loss of micro-batches in nats per labelled token.

    Args:
        accelerator: gives the device.
        model: a `TrainingModel`, not prepared yet.
        batches: collated micro-batches.
    """
    with evaluating(model):
        sums = [torch.stack(model(**to_device(batch, accelerator.device))).double() for batch in batches]
    total = torch.stack(sums).sum(0)
    return (total[0] / total[1]).item()


@dataclass(frozen=True)
class RangeTest:
    """The rates that were tried, and the chosen one. Losses are nats per labelled token on the same unseen examples."""

    rates: list[float]
    losses: list[float]  # nan or infinite where a training broke down
    before: float  # without any training
    chosen: float
    why: str


def range_test(
    accelerator: Accelerator,
    model: torch.nn.Module,
    groups: Callable[[float], list[dict[str, Any]]],
    examples: Examples,
    plan: Plan,
    batching: Batching,
    recipe_rate: float,
    clip_grad_norm: float,
    seed: int,
) -> RangeTest:
    """Try learning rates around the recipe's. Afterwards the parameters are as before, bit for bit.

    Args:
        accelerator: gives the device.
        model: a `TrainingModel`, not prepared yet.
        groups: learning rate → the optimizer's parameter groups.
        examples: training examples.
        plan: the examples of each step; the first are used.
        batching: makes micro-batches.
        recipe_rate: the middle of the rates that are tried.
        clip_grad_norm: bound of the gradient's norm; none where not positive.
        seed: seed of dropout.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in parameters]
    size = min(plan.examples_per_step, MAX_STEP_EXAMPLES)
    indices = first_examples(plan, (STEPS + PROBES) * size)
    probes = collate_examples(batching, examples, indices[: PROBES * size])
    steps = [indices[start : start + size] for start in range(PROBES * size, len(indices), size)] or [indices]
    training = [(collate_examples(batching, examples, step), int(examples.label_counts[step].sum())) for step in steps]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
                parameter.grad = None

    before = mean_loss(accelerator, model, probes)
    rates, losses = [factor * recipe_rate for factor in FACTORS], []
    try:
        with evaluating(model):  # which gives back the mode that the short trainings change
            for rate in rates:
                restore()
                train_shortly(accelerator, model, groups(rate), training, rate, clip_grad_norm, seed)
                losses.append(mean_loss(accelerator, model, probes))
    finally:
        restore()
    chosen, why = choose_rate(rates, losses, before, recipe_rate)
    return RangeTest(rates, losses, before, chosen, why)


def train_shortly(
    accelerator: Accelerator,
    model: torch.nn.Module,
    groups: list[dict[str, Any]],
    steps: Sequence[tuple[list[dict[str, Any]], int]],
    rate: float,
    clip_grad_norm: float,
    seed: int,
) -> None:
    """Take a step on each (micro-batches, number of labelled tokens), with a rate that falls linearly to zero."""
    model.train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]  # a method's groups may have rates of their own
    for number, (batches, label_tokens) in enumerate(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * (1 - number / len(steps))
        for batch in batches:
            loss, _ = model(**to_device(batch, accelerator.device))
            (loss / label_tokens).backward()
        if clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def choose_rate(
    rates: Sequence[float], losses: Sequence[float], before: float, recipe_rate: float
) -> tuple[float, str]:
    """Choose the rate with the lowest loss, refined by the parabola through it and its neighbours in log rate.

    Returns:
        (rate, reason).
    """
    usable = [finite_or_inf(loss) for loss in losses]
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
