"""Facts about the methods that PEFT can store, by PEFT's own name of the type ("LORA", …).

No other module of `adapters/` compares such a name. Nothing heavy is imported here, because command lines ask before
they load a model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One type of adapter; the fields are those of `methods.base.Method`."""

    title: str
    prompt_kind: str | None = None  # "embeddings", "keys_values"; None: no soft prompt
    merges_into: str | None = None  # "weights", "tokens"; None: a plain checkpoint can't hold it
    merge_obstacle: str = ""


KINDS = {
    "LORA": Kind("LoRA", merges_into="weights"),
    "IA3": Kind("IA3", merges_into="weights"),
    "PROMPT_TUNING": Kind("prompt tuning", "embeddings", "tokens"),
    "P_TUNING": Kind("P-tuning", "embeddings", "tokens"),
    "PREFIX_TUNING": Kind(
        "prefix tuning",
        "keys_values",
        merge_obstacle="is a prefix of keys and values in each layer, and no plain checkpoint can hold that: serve it "
        "with generate_peft.py or plain PEFT, or train prompt tuning or P-tuning instead",
    ),
}


def known_types() -> tuple[str, ...]:
    """Return the types that can be loaded, by PEFT's names."""
    return tuple(KINDS)


def title(peft_type: str) -> str:
    """Return the method's name in prose; for an unknown type, PEFT's name of it."""
    return KINDS[peft_type].title if peft_type in KINDS else peft_type


def prompt_kind(peft_type: str) -> str | None:
    """Return what a soft prompt consists of ("embeddings" or "keys_values"), or None for every other adapter."""
    return KINDS[peft_type].prompt_kind if peft_type in KINDS else None


def merges_into(peft_type: str) -> str | None:
    """Return where a plain checkpoint keeps the adapter ("weights" or "tokens"), or None where it can't."""
    return KINDS[peft_type].merges_into if peft_type in KINDS else None


def merge_obstacle(peft_type: str) -> str:
    """Return why a plain checkpoint can't hold the adapter, as the end of a sentence about it; "" where it can."""
    if peft_type in KINDS:
        return KINDS[peft_type].merge_obstacle
    mergeable = [kind.title for kind in KINDS.values() if kind.merges_into]
    return f"is {peft_type}, which can't be merged here: use {', '.join(mergeable[:-1])} or {mergeable[-1]}"
