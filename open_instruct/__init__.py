"""Parameter-efficient fine-tuning of language models, soft prompts above all. `docs/use.md` shows what can be done in Python."""

from __future__ import annotations

import importlib
from typing import Any

PUBLIC = {
    "load": "open_instruct.adapters.served",
    "Sampling": "open_instruct.adapters.generation",
    "merge": "open_instruct.merge_peft",
    "evaluate": "open_instruct.evaluate_peft",
    "inspect": "open_instruct.inspect_peft",
    "InputError": "open_instruct.errors",
}
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:
    """Import what is asked for, and nothing else: a tool that reads files needs no torch."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)
