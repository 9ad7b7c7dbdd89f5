"""An evaluation of base and adapters as a Markdown table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from open_instruct.report import pictures
from open_instruct.report.summary import shortened

WRITING = {
    "words": "references in words of another script than Latin",
    "chinese": "in Chinese characters",
    "characters": "in another script without blanks, by character",
}
UNITS = {
    "loss": "nats per labelled token",
    "perplexity": "per labelled token",
    "divergence": "nats per labelled token",
    "exact_match": "share of rows",
    "bleu": "0 to 100",
}


def markdown(result: dict[str, Any]) -> str:
    """Return tables: a row for each figure, a column for base and each adapter; then differences and a few answers."""
    names = list(result["figures"])
    metrics = list(result["figures"][names[0]])
    lines = [
        f"{result['model']}, {result['rows']:,} rows, 95 % intervals" if "rows" in result else str(result["model"]),
        "",
    ]
    lines += ["| figure | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {metric} | " + " | ".join(cell(result["figures"][name][metric]) for name in names) + " |"
        for metric in metrics
    ]
    if before := result.get("tokens_before"):
        lines.append("| tokens before a conversation | " + " | ".join(f"{before[name]:,}" for name in names) + " |")
    other = {kind: count for kind, count in result.get("writing", {}).items() if kind != "latin"}
    if other:
        kinds = ", ".join(f"{count} {WRITING[kind]}" for kind, count in other.items())
        lines += ["", f"ROUGE and BLEU: {kinds} (docs/use.md says how they are counted)."]
    if result.get("truncated"):
        lines += ["", f"{result['truncated']} rows were cut to the model's context."]
    if result.get("unlabelled"):
        lines += ["", f"{result['unlabelled']} rows have no labelled token in the context: the loss leaves them out."]
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
        for metric, figure in differences.items():
            low, high = figure["interval"]
            lines.append(f"| {metric} | {cell(figure, sign=True)} | {'yes' if low > 0 or high < 0 else 'no'} |")
    for number, example in enumerate(result.get("examples", [])[:3], start=1):
        lines += ["", f"question {number}: {shortened(example['question'], 120)}"]
        lines += [f"- {name}: {shortened(text, 120)}" for name, text in example.items() if name != "question"]
    return "\n".join(lines)


def cell(figure: dict[str, Any], sign: bool = False) -> str:
    """Return a value with its interval, if that is known."""
    if figure["interval"] is None:
        return f"{figure['value']:.4g}"
    low, high = figure["interval"]
    plus = "+" if sign else ""
    return f"{figure['value']:{plus}.4g} [{low:{plus}.4g}, {high:{plus}.4g}]"


def plot(result: dict[str, Any], path: Path) -> None:
    """Write each figure's values with their intervals, as a PNG."""
    names = list(result["figures"])
    metrics = list(result["figures"][names[0]])
    picture, grid = plt.subplots(1, len(metrics), figsize=(max(4, 2.2 * len(metrics)), 3.6), squeeze=False)
    for axes, metric in zip(grid[0], metrics, strict=True):
        values = [result["figures"][name][metric]["value"] for name in names]
        bounds = [result["figures"][name][metric]["interval"] for name in names]
        below = [max(0.0, value - bound[0]) if bound else 0.0 for value, bound in zip(values, bounds, strict=True)]
        above = [max(0.0, bound[1] - value) if bound else 0.0 for value, bound in zip(values, bounds, strict=True)]
        colours = ["tab:gray", *(f"C{number}" for number in range(len(names) - 1))]
        axes.bar(range(len(names)), values, yerr=[below, above], capsize=3, color=colours)
        axes.set_xticks(range(len(names)), [pictures.literal(name) for name in names], rotation=45, ha="right")
        axes.set_title(metric, fontsize=10)
        axes.set_ylabel(UNITS.get(metric, ""), fontsize=8)
    pictures.write_picture(picture, path, dpi=120)
