"""What a run prints before its first step and after its last."""

from __future__ import annotations

from typing import Any


def hyperparameter_lines(title: str, values: dict[str, Any], origins: dict[str, str], sources: str) -> str:
    """One line for each resolved hyperparameter, with its origin."""
    width = max(len(name) for name in values)
    lines = []
    for name, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"  {name:<{width}}  {shown:<14}  {origins.get(name, 'default')}")
    return f"{title}, hyperparameters (value, origin):\n" + "\n".join(lines) + f"\n  recipe from: {sources}"


def loss_text(value: float | None) -> str:
    """A loss for people."""
    return "not measured" if value is None else f"{value:.4f}"


def summary_lines(
    summary: dict[str, Any], samples: list[dict[str, str]], exact: dict[str, float] | None, output_dir: str
) -> str:
    """The readable end of a run.

    Args:
        summary: content of summary.json.
        samples: question, reference, base and tuned answer of some held-out conversations.
        exact: share of answers equal to the reference, for base and tuned model, and over how many.
        output_dir: folder of the run.
    """
    share = summary["trainable_parameters"] / summary["total_parameters"]
    lines = [
        "",
        f"held-out loss       base {loss_text(summary['base_eval_loss'])} | first {loss_text(summary['initial_eval_loss'])} | "
        f"final {loss_text(summary['final_eval_loss'])} nats per token",
        f"trained parameters  {summary['trainable_parameters']:,} of {summary['total_parameters']:,} ({share:.3%})",
        f"adapter size        {summary['adapter_bytes'] / 1e3:,.1f} kB",
        f"time                {summary['wall_seconds']:.1f} s for {summary['steps']} steps, {summary['tokens']:,} tokens "
        f"({summary['tokens_per_second']:,.0f} tokens/s), peak memory {summary['peak_memory_mb']:,.0f} MB",
    ]
    if exact:
        lines.append(
            f"exact match         base {exact['base']:.0%} | tuned {exact['tuned']:.0%} of {exact['number']:.0f} held-out answers"
        )
    for number, sample in enumerate(samples[:3], start=1):
        lines += [
            f"question {number}          {one_line(sample['question'])}",
            f"  reference         {one_line(sample['reference'])}",
            f"  base model        {one_line(sample['base'])}",
            f"  tuned model       {one_line(sample['tuned'])}",
        ]
    base, final = summary["base_eval_loss"], summary["final_eval_loss"]
    if base is not None and final is not None and final >= base:
        lines.append(f"warning: the held-out loss is not below the base model's ({final:.4f} against {base:.4f})")
    return "\n".join([*lines, f"everything is in    {output_dir}"])


def one_line(text: str, longest: int = 160) -> str:
    """Text without line breaks, cut at `longest` characters."""
    flat = " ⏎ ".join(line.strip() for line in text.strip().splitlines() if line.strip())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"
