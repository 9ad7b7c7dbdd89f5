"""Pictures of a study, each a PNG."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from open_instruct.study.figures import front

COSTS = {
    "trained": "trained parameters",
    "seconds": "training time (s)",
    "memory_mb": "peak memory (MB)",
    "bytes": "size on disk (bytes)",
}


def draw_all(figures: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draw what there is to draw into a folder.

    Returns:
        Captions by file name, in the order of the report.
    """
    methods = [method for method in figures["methods"] if method["works"]]
    colours = {method["name"]: f"C{number % 10}" for number, method in enumerate(methods)}
    wanted: dict[str, tuple[str, Callable[..., Any]]] = {
        "losses.png": (
            "Test loss of each method at its chosen point: mean over seeds with 95 % interval, and each seed",
            losses,
        ),
        "pareto_loss.png": (
            "Test loss against what it costs. The line joins methods that none beats in both",
            pareto_loss,
        ),
    }
    if figures["questions"]:
        wanted["pareto_exact.png"] = (
            "Exact match against what it costs. The line joins methods that none beats in both",
            pareto_exact,
        )
    wanted["curves.png"] = ("Held-out loss during training, all held-out rows, each seed of the chosen point", curves)
    if any(len(method["rates"]) > 1 for method in methods):
        wanted["rates.png"] = (
            "Test loss at each learning rate that was tried, at the best of all else; the chosen one is ringed",
            rates,
        )
    if figures["other_tokens"]:
        wanted["forgetting.png"] = (
            "Change of the loss on text that was not trained for, against the base model",
            forgetting,
        )
    for name, (_, draw) in wanted.items():
        picture = draw(methods, figures, colours)
        picture.tight_layout()
        picture.savefig(folder / name, dpi=110)
        plt.close(picture)
    return {name: caption for name, (caption, _) in wanted.items()}


def logarithmic(values: list[float]) -> bool:
    """Whether a log axis shows them better."""
    return min(values) > 0 and max(values) > 8 * min(values)


def losses(methods: list[dict[str, Any]], figures: dict[str, Any], colours: dict[str, str]) -> Any:
    """Means, intervals and seeds."""
    picture, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(methods)))
    for place, method in enumerate(reversed(methods)):
        mean, (low, high) = method["test"]["value"], method["test"]["interval"]
        error = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.errorbar([mean], [place], xerr=error, fmt="o", color=colours[method["name"]], capsize=4)
        axes.plot(
            method["by_seed"], [place + 0.18] * len(method["by_seed"]), "|", color=colours[method["name"]], markersize=9
        )
    axes.axvline(figures["base"]["loss"], color="black", linestyle="--", linewidth=1, label="base model")
    axes.set_yticks(range(len(methods)), [method["name"] for method in reversed(methods)])
    axes.set_ylim(-0.6, len(methods) - 0.3)
    axes.set_xlabel("test loss (nats per labelled token)")
    if logarithmic([*(v for m in methods for v in m["by_seed"]), figures["base"]["loss"]]):
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


def pareto_loss(methods: list[dict[str, Any]], figures: dict[str, Any], colours: dict[str, str]) -> Any:
    """Test loss over each cost."""
    values = {method["name"]: (method["test"]["value"], method["test"]["interval"]) for method in methods}
    return pareto(
        methods, figures, colours, values, "loss", "test loss (nats per labelled token)", figures["base"]["loss"]
    )


def pareto_exact(methods: list[dict[str, Any]], figures: dict[str, Any], colours: dict[str, str]) -> Any:
    """Exact match over each cost."""
    values: dict[str, tuple[float, list[float] | None]] = {
        method["name"]: (method["exact"], None) for method in methods
    }
    return pareto(methods, figures, colours, values, "exact", "exact match of test questions", figures["base"]["exact"])


def pareto(
    methods: list[dict[str, Any]],
    figures: dict[str, Any],
    colours: dict[str, str],
    values: dict[str, tuple[float, list[float] | None]],
    gain: str,
    label: str,
    base: float,
) -> Any:
    """One panel for each cost."""
    picture, grid = plt.subplots(2, 2, figsize=(11, 7.5))
    log = gain == "loss" and logarithmic([value for value, _ in values.values()] + [base])
    for axes, (cost, words) in zip(grid.flat, COSTS.items(), strict=True):
        for method in methods:
            value, bounds = values[method["name"]]
            error = None if bounds is None else [[max(0.0, value - bounds[0])], [max(0.0, bounds[1] - value)]]
            axes.errorbar([method[cost]], [value], yerr=error, fmt="o", color=colours[method["name"]], capsize=3)
            axes.annotate(method["name"], (method[cost], value), xytext=(5, 4), textcoords="offset points", fontsize=8)
        best = front(methods, cost, gain)
        place = {method["name"]: method[cost] for method in methods}
        axes.plot(
            [place[name] for name in best], [values[name][0] for name in best], color="gray", linewidth=1, zorder=0
        )
        axes.axhline(base, color="black", linestyle="--", linewidth=1)
        if logarithmic([method[cost] for method in methods]):
            axes.set_xscale("log")
        if log:
            axes.set_yscale("log")
        axes.margins(x=0.15)
        axes.set_xlabel(words)
        axes.set_ylabel(label, fontsize=8)
        axes.grid(alpha=0.3)
    return picture


def curves(methods: list[dict[str, Any]], figures: dict[str, Any], colours: dict[str, str]) -> Any:
    """Held-out loss over steps."""
    picture, axes = plt.subplots(figsize=(8, 5))
    shown = []
    for method in methods:
        for number, curve in enumerate(method["curves"]):
            axes.plot(
                *zip(*curve, strict=True),
                color=colours[method["name"]],
                alpha=0.8,
                label=None if number else method["name"],
            )
            shown += [value for _, value in curve]
    axes.axhline(figures["base"]["loss"], color="black", linestyle="--", linewidth=1, label="base model (test rows)")
    if logarithmic(shown):
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="held-out loss (nats per labelled token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return picture


def rates(methods: list[dict[str, Any]], figures: dict[str, Any], colours: dict[str, str]) -> Any:
    """Loss over the learning rate."""
    picture, axes = plt.subplots(figsize=(8, 5))
    for method in methods:
        if len(method["rates"]) > 1:
            axes.plot(*zip(*method["rates"], strict=True), "o-", color=colours[method["name"]], label=method["name"])
            chosen = [(rate, value) for rate, value in method["rates"] if math.isclose(rate, method["learning_rate"])]
            axes.plot(*zip(*chosen, strict=True), "o", color=colours[method["name"]], fillstyle="none", markersize=13)
    axes.axhline(figures["base"]["loss"], color="black", linestyle="--", linewidth=1, label="base model")
    axes.set_xscale("log")
    if logarithmic([value for method in methods for _, value in method["rates"]]):
        axes.set_yscale("log")
    axes.set(xlabel="learning rate", ylabel="test loss (nats per labelled token)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return picture


def forgetting(methods: list[dict[str, Any]], figures: dict[str, Any], colours: dict[str, str]) -> Any:
    """Change of the loss on other text."""
    picture, axes = plt.subplots(figsize=(8, 1.2 + 0.45 * len(methods)))
    for place, method in enumerate(reversed(methods)):
        axes.barh([place], [method["forgetting"]], color=colours[method["name"]])
    axes.set_yticks(range(len(methods)), [method["name"] for method in reversed(methods)])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("change of the loss on other text (nats per token; positive: forgotten)")
    axes.grid(alpha=0.3)
    return picture
