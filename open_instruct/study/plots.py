"""Pictures of a study, each a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from open_instruct.report import pictures
from open_instruct.study.figures import COSTS, Estimate, MethodFigures, StudyFigures, pareto_front

LOSS_LABEL = "test loss (nats per labelled token)"
Colours = dict[str, str]  # by the method's name


def draw_all(figures: StudyFigures, folder: Path) -> dict[str, str]:
    """Draw what there is to draw into a folder.

    Returns:
        Captions by file name, in the order of the report.
    """
    colours = {method.name: f"C{index % 10}" for index, method in enumerate(figures.methods)}
    kinds: dict[str, tuple[str, Callable[[StudyFigures, Colours], Figure]]] = {
        "losses.png": (
            "Test loss of each method at its chosen point: mean over seeds with 95 % interval, and each seed",
            draw_losses,
        ),
        "pareto_loss.png": (
            "Test loss against what it costs. The line joins methods that none beats in both",
            draw_pareto_loss,
        ),
    }
    if figures.num_questions:
        kinds["pareto_exact.png"] = (
            "Exact match against what it costs. The line joins methods that none beats in both",
            draw_pareto_exact,
        )
    if figures.answers:
        kinds["answers.png"] = (
            "Figures of the answers to test questions: mean over seeds with 95 % interval, and each seed",
            draw_answers,
        )
    kinds["curves.png"] = (
        "Held-out loss during training, by what each trial learns (--labels), all rows, each seed of the chosen point",
        draw_curves,
    )
    if any(len(method.rates) > 1 for method in figures.methods):
        kinds["rates.png"] = (
            "Test loss at each learning rate that was tried, at the best of all else; the chosen one is ringed",
            draw_rates,
        )
    if figures.num_other_tokens:
        kinds["forgetting.png"] = (
            "Change of the loss on text that was not trained for, against the base model",
            draw_forgetting,
        )
    drawn = {}
    for name, (caption, draw) in kinds.items():
        with pictures.if_possible(folder / name):
            pictures.write_picture(draw(figures, colours), folder / name, dpi=110)
            drawn[name] = caption
    return drawn


def wants_log_axis(values: Sequence[float]) -> bool:
    """Return whether values spread so far that a log axis shows them better."""
    return min(values) > 0 and max(values) > 8 * min(values)


def draw_base(axes: Axes, loss: float, label: str = "base model") -> None:
    """Draw the base model's loss as a horizontal line."""
    axes.axhline(loss, color="black", linestyle="--", linewidth=1, label=label)


def error_bar(estimate: Estimate) -> list[list[float]]:
    """Return the lengths of an interval's two arms, as `errorbar` takes them."""
    low, high = estimate.interval
    return [[max(0.0, estimate.value - low)], [max(0.0, high - estimate.value)]]


def draw_losses(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw each method's mean, interval and seeds, the best method on top."""
    methods = figures.methods
    picture, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(methods)))
    for height, method in enumerate(reversed(methods)):
        colour = colours[method.name]
        axes.errorbar([method.test.value], [height], xerr=error_bar(method.test), fmt="o", color=colour, capsize=4)
        axes.plot(method.by_seed, [height + 0.18] * len(method.by_seed), "|", color=colour, markersize=9)
    axes.axvline(figures.base.loss, color="black", linestyle="--", linewidth=1, label="base model")
    axes.set_yticks(range(len(methods)), [pictures.literal(method.name) for method in reversed(methods)])
    axes.set_ylim(-0.6, len(methods) - 0.3)
    axes.set_xlabel(LOSS_LABEL)
    if wants_log_axis([*(loss for method in methods for loss in method.by_seed), figures.base.loss]):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


def draw_answers(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw a panel for each figure of answers: each method's mean, interval and seeds, and the base model's value."""
    num_columns = min(3, len(figures.answers))
    num_rows = math.ceil(len(figures.answers) / num_columns)
    names = [method.name for method in reversed(figures.methods)]
    height = 1.2 + 0.4 * len(names)
    picture, grid = plt.subplots(num_rows, num_columns, figsize=(4.5 * num_columns, height * num_rows), squeeze=False)
    for axes in list(grid.flat)[len(figures.answers) :]:
        axes.set_visible(False)
    for axes, figure in zip(grid.flat, figures.answers, strict=False):
        for method in figure.methods:
            position, colour = names.index(method.name), colours[method.name]
            bar = error_bar(Estimate(method.value, method.interval))
            axes.errorbar([method.value], [position], xerr=bar, fmt="o", color=colour, capsize=4)
            axes.plot(method.by_seed, [position + 0.18] * len(method.by_seed), "|", color=colour, markersize=9)
        axes.axvline(figure.base, color="black", linestyle="--", linewidth=1, label="base model")
        axes.set_yticks(range(len(names)), [pictures.literal(name) for name in names])
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_xlabel(figure.title)
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize=8)
    return picture


def draw_pareto_loss(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw test losses over each cost."""
    losses = [method.test.value for method in figures.methods]
    log = wants_log_axis([*losses, figures.base.loss])

    def draw_method(axes: Axes, method: MethodFigures, cost: float) -> None:
        axes.errorbar(
            [cost], [method.test.value], yerr=error_bar(method.test), fmt="o", color=colours[method.name], capsize=3
        )

    return pareto_panels(figures, losses, losses, draw_method, LOSS_LABEL, figures.base.loss, log)


def draw_pareto_exact(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw exact matches over each cost."""
    shares = [method.exact for method in figures.methods]
    badness = [-share for share in shares]

    def draw_method(axes: Axes, method: MethodFigures, cost: float) -> None:
        axes.errorbar([cost], [method.exact], fmt="o", color=colours[method.name], capsize=3)

    label = "exact match of test questions"
    return pareto_panels(figures, shares, badness, draw_method, label, figures.base.exact, False)


def pareto_panels(
    figures: StudyFigures,
    results: Sequence[float],
    badness: Sequence[float],
    draw_method: Callable[[Axes, MethodFigures, float], None],
    label: str,
    base: float,
    log: bool,
) -> Figure:
    """Draw a panel for each cost, with the methods, their front and the base model.

    Args:
        figures: the study's figures.
        results: height of each method.
        badness: what the front makes small, of each method.
        draw_method: draws a method's marker at a cost.
        label: label of the vertical axes.
        base: height of the base model.
        log: whether the vertical axes are logarithmic.
    """
    picture, grid = plt.subplots(2, 2, figsize=(11, 7.5))
    heights = {method.name: result for method, result in zip(figures.methods, results, strict=True)}
    for axes, cost in zip(grid.flat, COSTS, strict=True):
        costs = {method.name: cost.of(method) for method in figures.methods}
        for method in figures.methods:
            draw_method(axes, method, costs[method.name])
            position = (costs[method.name], heights[method.name])
            axes.annotate(method.name, position, xytext=(5, 4), textcoords="offset points", fontsize=8)
        front = pareto_front(
            {method.name: (costs[method.name], bad) for method, bad in zip(figures.methods, badness, strict=True)}
        )
        axes.plot(
            [costs[name] for name in front], [heights[name] for name in front], color="gray", linewidth=1, zorder=0
        )
        draw_base(axes, base)
        if wants_log_axis(list(costs.values())):
            axes.set_xscale("log")
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(cost.label)
        axes.set_ylabel(label, fontsize=8)
        axes.grid(alpha=0.3)
    return picture


def draw_curves(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw held-out losses over steps, a line for each seed."""
    picture, axes = plt.subplots(figsize=(8, 5))
    for method in figures.methods:
        for index, curve in enumerate(method.curves):
            label = None if index else method.name
            axes.plot(*zip(*curve, strict=True), color=colours[method.name], alpha=0.8, label=label)
    draw_base(axes, figures.base.loss, "base model (test rows)")
    if wants_log_axis([loss for method in figures.methods for curve in method.curves for _, loss in curve]):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="held-out loss (nats per labelled token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return picture


def draw_rates(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw test losses over the learning rate."""
    picture, axes = plt.subplots(figsize=(8, 5))
    for method in figures.methods:
        if len(method.rates) > 1:
            colour = colours[method.name]
            axes.plot(*zip(*method.rates, strict=True), "o-", color=colour, label=method.name)
            chosen = [(rate, loss) for rate, loss in method.rates if math.isclose(rate, method.learning_rate)]
            axes.plot(*zip(*chosen, strict=True), "o", color=colour, fillstyle="none", markersize=13)
    draw_base(axes, figures.base.loss)
    axes.set_xscale("log")
    if wants_log_axis([loss for method in figures.methods for _, loss in method.rates]):
        axes.set_yscale("log")
    axes.set(xlabel="learning rate", ylabel=LOSS_LABEL)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return picture


def draw_forgetting(figures: StudyFigures, colours: Colours) -> Figure:
    """Draw the change of the loss on other text."""
    methods = figures.methods
    picture, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * len(methods)))
    for height, method in enumerate(reversed(methods)):
        change = Estimate(method.forgetting, method.forgetting_interval or [method.forgetting] * 2)
        axes.barh([height], [change.value], xerr=error_bar(change), capsize=3, color=colours[method.name])
    axes.set_yticks(range(len(methods)), [pictures.literal(method.name) for method in reversed(methods)])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("change of the loss on other text (nats per token; positive: forgotten)")
    axes.grid(alpha=0.3)
    return picture
