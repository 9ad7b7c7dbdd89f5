"""An evaluation of existing answers as Markdown tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_instruct.report.summary import shortened
from open_instruct.report.tables import WRITING, cell

BELOW = ("_precision", "_recall")  # figures that stand in a table of their own


def markdown(result: dict[str, Any]) -> str:
    """Return tables: a row for each figure, a column for each model; then differences and a few answers."""
    figures = result["figures"]
    names = list(figures)
    metrics = list(dict.fromkeys(metric for by_name in figures.values() for metric in by_name))
    main, parts = [m for m in metrics if not is_part(m)], [m for m in metrics if is_part(m)]
    files = ", ".join(result["answers"])
    lines = [f"{files}: {result['rows']:,} questions, {counts_in_words(result)}, 95 % intervals", ""]
    for chosen in filter(None, (main, parts)):
        lines += ["| figure | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for metric in chosen:
            cells = [cell(figures[name][metric]) if metric in figures[name] else "–" for name in names]
            lines.append(f"| {metric} | " + " | ".join(cells) + " |")
        lines.append("")
    other = {kind: count for kind, count in result["writing"].items() if kind != "latin"}
    if other:
        kinds = ", ".join(f"{count} {WRITING[kind]}" for kind, count in other.items())
        lines += [f"ROUGE and BLEU: {kinds} (docs/use.md says how they are counted).", ""]
    for pair in result["differences"]:
        lines += [f"{pair['model']} less {pair['baseline']}, on the same questions:", ""]
        lines += ["| figure | difference | interval without 0 |", "|---|---|---|"]
        for metric, figure in pair["figures"].items():
            if not is_part(metric):
                low, high = figure["interval"]
                lines.append(f"| {metric} | {cell(figure, sign=True)} | {'yes' if low > 0 or high < 0 else 'no'} |")
        lines.append("")
    for number, example in enumerate(result["examples"][:3], start=1):
        lines += [f"question {number}: {shortened(example['question'], 120)}"]
        lines += [f"- reference: {shortened(text, 120)}" for text in example["references"][:1]]
        lines += [f"- {name}: {shortened(texts[0], 120)}" for name, texts in example["answers"].items()]
        lines.append("")
    return "\n".join(lines[:-1])


def is_part(metric: str) -> bool:
    """Return whether a figure is a precision or recall of ROUGE, whose F1 has the plain name."""
    return metric.startswith("rouge") and metric.split(" ")[0].endswith(BELOW)


def counts_in_words(result: dict[str, Any]) -> str:
    """Return in words how many answers and references the questions have."""
    ranges = {tuple(bounds) for bounds in result["answers_per_question"].values()}
    low, high = min(bound[0] for bound in ranges), max(bound[1] for bound in ranges)
    answers = f"{low} answer{'s' * (low > 1)} each" if low == high else f"{low} to {high} answers each"
    low, high = result["references_per_question"]
    references = f"{low} reference{'s' * (low != 1)}" if low == high else f"{low} to {high} references"
    return f"{answers}, {references}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Write the values with their intervals that all models have, without precision and recall, as a PNG."""
    from open_instruct.report import evaluation  # imports matplotlib

    figures = result["figures"]
    first, *others = figures.values()
    common = [metric for metric in first if not is_part(metric) and all(metric in by_name for by_name in others)]
    evaluation.plot({"figures": {name: {m: by[m] for m in common} for name, by in figures.items()}}, path)
