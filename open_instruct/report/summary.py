"""Texts that a run prints before its first step and after its last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from open_instruct.data.texts import plain


def hyperparameter_lines(title: str, values: dict[str, Any], origins: Mapping[str, str], sources: str) -> str:
    """Return one line for each resolved hyperparameter, with its origin."""
    width = max(len(name) for name in values)
    lines = []
    for name, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"  {name:<{width}}  {shown:<14}  {origins.get(name, 'default')}")
    return f"{title}, hyperparameters (value, origin):\n" + "\n".join(lines) + f"\n  recipe from: {sources}"


def loss_text(value: float | None) -> str:
    """Return a loss as readable text."""
    return "not measured" if value is None else f"{value:.4f}"


def sources_text(losses: Mapping[str, float], base: Mapping[str, float]) -> str:
    """Return the held-out loss of each source and, in brackets, the base model's, to follow a line; "" of none."""
    parts = [f"{plain(name)} {loss:.4f} ({base.get(name, math.nan):.4f})" for name, loss in losses.items()]
    return f" | {', '.join(parts)}" if parts else ""


def summary_lines(
    summary: dict[str, Any], samples: list[dict[str, str]], exact: dict[str, float] | None, output_dir: str
) -> str:
    """Return the lines with which a run ends.

    Args:
        summary: content of summary.json.
        samples: question, reference, base and tuned answer of some held-out conversations.
        exact: share of answers equal to the reference, of base and tuned model, and the number of answers; None: not
            measured.
        output_dir: the run's folder.
    """
    share = summary["trainable_parameters"] / summary["total_parameters"]
    saved = "model size  " if share == 1 else "adapter size"
    lines = [
        "",
        f"held-out loss       base {loss_text(summary['base_eval_loss'])} | "
        f"first {loss_text(summary['initial_eval_loss'])} | "
        f"final {loss_text(summary['final_eval_loss'])} nats per token",
        *(
            f"  {plain(name)}: base {loss_text(of_source['base_eval_loss'])} | "
            f"first {loss_text(of_source['initial_eval_loss'])} | final {loss_text(of_source['final_eval_loss'])} "
            f"({of_source['held_out_rows']:,} rows)"
            for name, of_source in summary["by_source"].items()
        ),
        f"trained parameters  {summary['trainable_parameters']:,} of {summary['total_parameters']:,} ({share:.3%})",
        f"{saved}        {summary['adapter_bytes'] / 1e3:,.1f} kB",
        f"time                {summary['wall_seconds']:.1f} s for {summary['steps']} steps, "
        f"{summary['tokens']:,} tokens ({summary['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {summary['peak_memory_mb']:,.0f} MB",
        f"ended by            {summary['ended_by']}",
    ]
    if exact:
        lines.append(
            f"exact match         base {exact['base']:.0%} | tuned {exact['tuned']:.0%} "
            f"of {exact['number']:.0f} held-out answers"
        )
    for number, sample in enumerate(samples[:3], start=1):
        question, reference, base, tuned = (
            shortened(sample[key]) for key in ("question", "reference", "base", "tuned")
        )
        lines += [
            f"question {number}          {question}",
            f"  reference         {reference}",
            f"  base model        {base}",
            f"  tuned model       {tuned}",
        ]
    base_loss, final_loss = summary["base_eval_loss"], summary["final_eval_loss"]
    if base_loss is not None and final_loss is not None and final_loss >= base_loss:
        lines.append(
            f"warning: the held-out loss is not below the base model's ({final_loss:.4f} against {base_loss:.4f})"
        )
    return "\n".join([*lines, f"everything is in    {output_dir}"])


def shortened(text: str, longest: int = 160) -> str:
    """Return a text without line breaks (⏎ stands for them) and empty lines, cut at `longest` characters."""
    flat = " ⏎ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
