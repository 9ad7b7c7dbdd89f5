"""Pictures of a run."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from open_instruct.report import pictures

OF_SOURCE = "eval_loss/"  # begins the names of sources' held-out losses in metrics.jsonl
MAX_SOURCES = 8  # that are drawn; more can't be told apart


def plot_losses(rows: list[dict[str, Any]], base_loss: float | None, title: str, path: Path) -> None:
    """Write training loss, held-out loss and the base model's held-out loss over steps, as a PNG.

    Args:
        rows: rows of metrics.jsonl.
        base_loss: held-out loss of the base model, in nats per labelled token.
        title: title of the picture.
        path: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 5))
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    if len(train) >= 20:
        axes.plot(
            [step for step, _ in train],
            smoothed([loss for _, loss in train]),
            color="tab:blue",
            label="training, smoothed",
        )
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    for name in list(dict.fromkeys(name for row in rows for name in row if name.startswith(OF_SOURCE)))[:MAX_SOURCES]:
        of_source = [(row["step"], row[name]) for row in rows if name in row]
        label = pictures.literal(f"held out, {name.removeprefix(OF_SOURCE)}")
        axes.plot(*zip(*of_source, strict=True), ".:", linewidth=1, label=label)
    if base_loss is not None:
        axes.axhline(
            base_loss, color="black", linestyle="--", linewidth=1, label=f"held out, base model ({base_loss:.3f})"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per labelled token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    pictures.write_picture(figure, path, dpi=120)


def plot_rates(rates: list[float], losses: list[float], before: float, chosen: float, path: Path) -> None:
    """Write the losses of a learning-rate range test, as a PNG.

    Args:
        rates: the learning rates that were tried.
        losses: loss after a short training at each rate, in nats per labelled token; not finite where it diverged.
        before: the loss without training.
        chosen: the rate that was chosen.
        path: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5))
    finite = [(rate, loss) for rate, loss in zip(rates, losses, strict=True) if math.isfinite(loss)]
    if finite:
        axes.plot(*zip(*finite, strict=True), "o-", color="tab:blue", label="after a short training")
    axes.axhline(before, color="black", linestyle="--", linewidth=1, label=f"before ({before:.3f})")
    axes.axvline(chosen, color="tab:orange", label=f"chosen: {chosen:.3g}")
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="loss (nats per labelled token)", title="learning-rate range test")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    pictures.write_picture(figure, path, dpi=120)


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, corrected for its start from 0 (as in Adam, Kingma and Ba 2015)."""
    average, out = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**count))
    return out


def plot_sources(counts: dict[str, Counter[str]], title: str, path: Path, most: int = 30) -> None:
    """Write the share of each value, input against subsets, as grouped bars in a PNG.

    Args:
        counts: for "input" and each subset, the number of rows with each value.
        title: title of the picture.
        path: the PNG to write.
        most: number of values shown, the input's commonest first.
    """
    names = [name for name, _ in counts["input"].most_common(most)][::-1]
    height = 0.8 / len(counts)
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.4 * len(names)))
    for number, (label, counter) in enumerate(counts.items()):
        total = sum(counter.values())
        heights = [row + 0.4 - (number + 0.5) * height for row in range(len(names))]
        axes.barh(heights, [counter[name] / total for name in names], height=height, label=f"{label} ({total:,} rows)")
    axes.set_yticks(range(len(names)), [pictures.literal(name) for name in names])
    axes.set_xlabel("share of the rows")
    axes.set_title(title)
    axes.legend()
    pictures.write_picture(figure, path, dpi=120)
