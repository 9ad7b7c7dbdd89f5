"""Parameter-efficient fine-tuning of language models, soft prompts above all. `docs/use.md` shows its use in Python."""

from __future__ import annotations

import importlib
from typing import Any

PUBLIC = {
    "load": "open_instruct.adapters.served",
    "Sampling": "open_instruct.adapters.generation",
    "merge": "open_instruct.adapters.merging",
    "evaluate": "open_instruct.adapters.evaluation",
    "evaluate_answers": "open_instruct.adapters.answer_evaluation",
    "inspect": "open_instruct.adapters.inspection",
    "InputError": "open_instruct.errors",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a tool that only reads files needs no torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("open_instruct.quiet")  # before the libraries that it silences
    return getattr(importlib.import_module(PUBLIC[name]), name)
