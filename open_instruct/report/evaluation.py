"""An evaluation of base and adapters as a Markdown table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from open_instruct.data.texts import plain
from open_instruct.report import pictures
from open_instruct.report.summary import shortened
from open_instruct.report.tables import WRITING, cell

UNITS = {
    "loss": "nats per labelled token",
    "perplexity": "per labelled token",
    "divergence": "nats per labelled token",
    "other_text_loss": "nats per token",
    "other_text_perplexity": "per token",
    "similarity": "cosine",
    "exact_match": "share of rows",
    "bleu": "0 to 100",
    "chrf": "0 to 100",
}


def markdown(result: dict[str, Any]) -> str:
    """Return tables: a row for each figure, a column for base and each adapter; then differences and a few answers."""
    names = list(result["figures"])
    metrics = list(result["figures"][names[0]])
    lines = [measured_on(result), ""]
    lines += ["| figure | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {metric} | " + " | ".join(cell(result["figures"][name][metric]) for name in names) + " |"
        for metric in metrics
    ]
    if before := result.get("tokens_before"):
        lines.append("| tokens before a conversation | " + " | ".join(f"{before[name]:,}" for name in names) + " |")
    if hard := result.get("hard_prompt_tokens"):
        cells = " | ".join(f"{hard.get(name, 0):,}" for name in names)
        lines.append(f"| tokens of the hard prompt | {cells} |")
    if size := result.get("bytes_before"):
        cells = " | ".join(f"{size[name] / 1e6:,.3g}" for name in names)
        lines.append(f"| their keys and values, MB a request | {cells} |")
    if seconds := result.get("first_token_seconds"):
        cells = " | ".join(f"{1000 * seconds[name]:.3g}" for name in names)
        lines.append(f"| first token, ms, one request at a time | {cells} |")
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
    for name, of_file in result.get("by_file", {}).items():
        lines += ["", f"{name} ({of_file['rows']:,} rows; differences on the same rows):", "", *file_table(of_file)]
    lines += source_table(result.get("loss_by_source") or {}, names)
    for number, example in enumerate(result.get("examples", [])[:3], start=1):
        lines += ["", f"question {number}: {shortened(example['question'], 120)}"]
        lines += [f"- {name}: {shortened(text, 120)}" for name, text in example.items() if name != "question"]
    return "\n".join(lines)


def measured_on(result: dict[str, Any]) -> str:
    """Return in a line what was measured, and on what."""
    if "rows" not in result:
        return str(result["model"])
    files = f" of {len(result['by_file'])} files" if result.get("by_file") else ""
    other = result.get("other_text")
    text = f", {other['tokens']:,} tokens in {other['passages']:,} passages of other text" if other else ""
    return f"{result['model']}, {result['rows']:,} rows{files}{text}, 95 % intervals"


def file_table(of_file: dict[str, Any]) -> list[str]:
    """Return the lines of a file's table: a row for each figure, with each model's value and difference from the base.

    Args:
        of_file: figures and differences_from_base, of one of several files.
    """
    figures, differences = of_file["figures"], of_file["differences_from_base"]
    base, *others = figures
    heads = ["figure", *figures, *(f"{name} less {base}" for name in others)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for metric in figures[base]:
        cells = [metric, *(cell(of_model[metric]) for of_model in figures.values())]
        cells += [cell(differences[name][metric], sign=True) for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def source_table(by_source: dict[str, dict[str, Any]], names: list[str]) -> list[str]:
    """Return the lines of a table: a row for each source, with the loss of each model and differences from the base.

    Args:
        by_source: of `evaluation.loss_by_source`; empty: no line is returned.
        names: of the models, the base first.
    """
    if not by_source:
        return []
    base, *others = names
    heads = ["source", "rows", *names, *(f"{name} less {base}" for name in others)]
    lines = ["", "Loss of each source, nats per labelled token (differences on the same rows):", ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for source, of_source in by_source.items():
        cells = [plain(source).replace("|", "\\|"), f"{of_source['rows']:,}"]
        cells += [cell(of_source["loss"][name]) for name in names]
        cells += [cell(of_source["differences_from_base"][name], sign=True) for name in others]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot_compression(axes: Any, figures: dict[str, dict[str, Any]], before: dict[str, int]) -> None:
    """Draw a figure of adapters over the tokens before a conversation; base and base behind the context are lines.

    Args:
        axes: of matplotlib.
        figures: values with intervals: of the base, of the base behind the context, then of adapters.
        before: tokens of each.
    """
    base, bound, *adapters = figures
    for name, style in ((base, ":"), (bound, "--")):
        axes.axhline(figures[name]["value"], color="tab:gray", linestyle=style, label=pictures.literal(name))
    adapters.sort(key=before.__getitem__)
    values = [figures[name]["value"] for name in adapters]
    bounds = [figures[name]["interval"] or (value, value) for name, value in zip(adapters, values, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
    axes.errorbar([before[name] for name in adapters], values, yerr=[below, above], marker="o", capsize=3)
    axes.set_xscale("symlog", linthresh=1)
    ticks = sorted({before[name] for name in (*adapters, bound)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(-0.5 if 0 in ticks else 0.7 * ticks[0], 1.4 * ticks[-1])
    axes.set_xlabel("tokens before", fontsize=8)
    axes.legend(fontsize=7)


def plot(result: dict[str, Any], path: Path) -> None:
    """Write each figure's values with their intervals, as a PNG; below, over a context's tokens, and of each file."""
    names = list(result["figures"])
    metrics = list(result["figures"][names[0]])
    before = result.get("tokens_before")
    files = result.get("by_file", {})
    num_rows = 1 + bool(before) + len(files)
    size = max(4, 2.2 * len(metrics)), 3.6 * num_rows
    picture, grid = plt.subplots(num_rows, len(metrics), figsize=size, squeeze=False)
    if before:
        for axes, metric in zip(grid[1], metrics, strict=True):
            plot_compression(axes, {name: result["figures"][name][metric] for name in names}, before)
    bars = [(axes, metric, result["figures"], metric) for axes, metric in zip(grid[0], metrics, strict=True)]
    for panels, (file, of_file) in zip(grid[num_rows - len(files) :], files.items(), strict=True):
        for axes, metric in zip(panels, metrics, strict=True):
            axes.set_visible(metric in of_file["figures"][names[0]])  # the other text belongs to no file
            if axes.get_visible():
                bars.append((axes, metric, of_file["figures"], f"{metric}, {file}"))
    for axes, metric, figures, title in bars:
        values = [figures[name][metric]["value"] for name in names]
        bounds = [figures[name][metric]["interval"] for name in names]
        below = [max(0.0, value - bound[0]) if bound else 0.0 for value, bound in zip(values, bounds, strict=True)]
        above = [max(0.0, bound[1] - value) if bound else 0.0 for value, bound in zip(values, bounds, strict=True)]
        colours = ["tab:gray", *(f"C{number}" for number in range(len(names) - 1))]
        axes.bar(range(len(names)), values, yerr=[below, above], capsize=3, color=colours)
        axes.set_xticks(range(len(names)), [pictures.literal(name) for name in names], rotation=45, ha="right")
        axes.set_title(pictures.literal(title), fontsize=10)
        axes.set_ylabel(UNITS.get(metric, ""), fontsize=8)
    pictures.write_picture(picture, path, dpi=120)
