"""Base and adapters side by side: a Markdown table and a picture of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

UNITS = {
    "loss": "nats per labelled token",
    "perplexity": "per labelled token",
    "exact_match": "share of rows",
    "bleu": "0 to 100",
}


def markdown(result: dict[str, Any]) -> str:
    """A row for each figure, a column for base and each adapter, then differences from the base and a few answers."""
    names = list(result["figures"])
    figures = list(result["figures"][names[0]])
    lines = [
        f"{result['model']}, {result['rows']:,} rows, 95 % intervals" if "rows" in result else str(result["model"]),
        "",
    ]
    lines += ["| figure | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {figure} | " + " | ".join(cell(result["figures"][name][figure]) for name in names) + " |"
        for figure in figures
    ]
    if result.get("truncated"):
        lines += ["", f"{result['truncated']} rows were cut to the model's context."]
    if result.get("unanswered"):
        lines += ["", f"{result['unanswered']} questions fill the model's context and have no answer."]
    for name, differences in result.get("differences_from_base", {}).items():
        lines += [
            "",
            f"{name} less base, on the same rows:",
            "",
            "| figure | difference | interval without 0 |",
            "|---|---|---|",
        ]
        for figure, value in differences.items():
            low, high = value["interval"]
            lines.append(f"| {figure} | {cell(value, sign=True)} | {'yes' if low > 0 or high < 0 else 'no'} |")
    for number, example in enumerate(result.get("examples", [])[:3], start=1):
        lines += ["", f"question {number}: {short(example['question'])}"]
        lines += [f"- {name}: {short(text)}" for name, text in example.items() if name != "question"]
    return "\n".join(lines)


def cell(figure: dict[str, Any], sign: bool = False) -> str:
    """A value and its interval, if one is known."""
    if figure["interval"] is None:
        return f"{figure['value']:.4g}"
    low, high = figure["interval"]
    plus = "+" if sign else ""
    return f"{figure['value']:{plus}.4g} [{low:{plus}.4g}, {high:{plus}.4g}]"


def short(text: str, most: int = 120) -> str:
    """One line of a text."""
    line = " ⏎ ".join(text.splitlines())
    return line if len(line) <= most else line[: most - 1] + "…"


def plot(result: dict[str, Any], path: Path) -> None:
    """Each figure's values with their intervals, as a PNG."""
    names = list(result["figures"])
    figures = list(result["figures"][names[0]])
    picture, axes = plt.subplots(1, len(figures), figsize=(max(4, 2.2 * len(figures)), 3.6), squeeze=False)
    for place, figure in zip(axes[0], figures, strict=True):
        values = [result["figures"][name][figure]["value"] for name in names]
        bounds = [result["figures"][name][figure]["interval"] for name in names]
        below = [max(0.0, value - bound[0]) if bound else 0.0 for value, bound in zip(values, bounds, strict=True)]
        above = [max(0.0, bound[1] - value) if bound else 0.0 for value, bound in zip(values, bounds, strict=True)]
        colours = ["tab:gray", *(f"C{number}" for number in range(len(names) - 1))]
        place.bar(range(len(names)), values, yerr=[below, above], capsize=3, color=colours)
        place.set_xticks(range(len(names)), names, rotation=45, ha="right")
        place.set_title(figure, fontsize=10)
        place.set_ylabel(UNITS.get(figure, ""), fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=120)
    plt.close(picture)
