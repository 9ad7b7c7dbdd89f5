"""Flags of distillation: an adapter that replaces a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from open_instruct.flags import combinations as checks
from open_instruct.flags.declare import flag


@dataclass(frozen=True)
class DistillationFlags:
    """Distillation of a context into an adapter."""

    distill_context: str | None = flag(
        None,
        "text file whose effect the adapter learns: its outputs come near to those of the base with this text before "
        "each conversation, which the adapter never sees. The rows' answers only choose the positions",
        check=checks.cannot_distill,
        on_resume="content",
        causal_only=True,
    )
    distill_system: bool = flag(
        False,
        "as --distill_context, with each row's own system message for the text: the adapter learns to do without it",
        check=checks.cannot_distill,
        on_resume="same",
        causal_only=True,
    )
    distill_column: str | None = flag(
        None,
        "as --distill_context, with the text in this column of each row",
        check=checks.cannot_distill,
        on_resume="same",
        causal_only=True,
    )
    distill_loss: Literal["forward", "reverse", "mixed"] = flag(
        "forward",
        "divergence from the base with the context. forward: KL(it, adapter); reverse: KL(adapter, it); mixed: their "
        "mean",
        check=checks.without_distillation,
        on_resume="same",
    )
    distill_offload: bool = flag(
        False,
        "keep the keys and values of the context in the CPU's memory; each layer gets its own when it needs them",
        check=checks.without_distillation,
        on_resume="free",
    )
    distill_weight: float = flag(
        1.0,
        "share of the divergence in the loss; the rest is the usual loss of the rows' answers",
        check=checks.without_distillation,
        above=0,
        at_most=1,
        on_resume="same",
    )
