"""Declaration of a flag: a dataclass field whose metadata carries all facts about the flag."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, field
from pathlib import Path
from typing import Any, Literal

from open_instruct.errors import visible

MAX_INT = 2**62  # whole numbers beyond it fit no counter


def flag(
    default: Any,
    description: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    chooses: str | None = None,
    includes: str | None = None,
    joins: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    needs: str | None = None,
    warns_without: str | None = None,
    check: Callable[[Any], str | None] | None = None,
    on_resume: Literal["same", "content", "free"] | None = None,
    in_study: Literal["free", "same", "decided"] = "free",
    shown: bool = False,
    differs: str | None = None,
    causal_only: bool = False,
    pairs_only: bool = False,
    optional_value: Any = None,
    form: Literal["name", "text", "json"] = "name",
    aliases: tuple[str, ...] = (),
) -> Any:
    """Declare a flag.

    Args:
        default: value if the flag is not given; None: decided elsewhere, as by the recipe.
        description: help text, with the unit.
        at_least: smallest value, inclusive.
        at_most: largest value, inclusive.
        above: bound that the value must exceed.
        below: bound that the value must stay under.
        chooses: fine-tuning method that the flag chooses.
        includes: another flag that chooses a method and may be given beside this one.
        joins: methods of other flags, any one of which is trained together with this one's where both flags are given.
        methods: methods that the flag belongs to; empty: all. With another method it is refused.
        needs: flag without which this one has no effect, and is refused.
        warns_without: flag without which this one has no effect, as a warning says: commands of open-instruct give it.
        check: called with all flags if this one was given; returns what is wrong with the combination, or None.
        on_resume: "same": a resumed run must have the same value, as the recipe resolves it; "content": its value may
            change, but not what comes of it (rows, weights, rate, number of steps, attention), which is compared
            instead; "free": it changes results by no more than rounding and draws of dropout. Each flag needs one.
        in_study: "same": all trials of a fair study share it; "decided": the study sets it; "free": it may differ.
        shown: printed with its origin before the first step.
        causal_only: refused for an encoder–decoder.
        pairs_only: refused for a causal language model.
        differs: why the default is not open-instruct's.
        optional_value: value if the flag is given without one.
        form: of a text. "name": one line; "text": any; "json": a JSON object, which a YAML file may give as a mapping.
        aliases: other names of the same flag, as those of Hugging Face's Trainer.
    """
    facts = dict(locals())
    default = facts.pop("default")
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


def out_of_bounds(item: Field[Any], value: Any) -> str | None:
    """Return why a value violates the flag's own bounds, or None. Numbers must be finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    facts = item.metadata
    bounds = {
        "at least": facts["at_least"],
        "above": facts["above"],
        "at most": facts["at_most"],
        "below": facts["below"],
    }
    inside = (
        (abs(value) <= MAX_INT if isinstance(value, int) else math.isfinite(value))
        and (facts["at_least"] is None or value >= facts["at_least"])
        and (facts["above"] is None or value > facts["above"])
        and (facts["at_most"] is None or value <= facts["at_most"])
        and (facts["below"] is None or value < facts["below"])
    )
    if inside:
        return None
    rule = " and ".join(f"{words} {bound:.10g}" for words, bound in bounds.items() if bound is not None)
    shown = str(value) if abs(value) <= MAX_INT or not isinstance(value, int) else "(a number that fits no counter)"
    return f"--{item.name} {shown} is out of range: it must be " + (rule or "finite")


def unusable_text(value: Any, several_lines: bool = False) -> str | None:
    """Return why a text, or a text in a list, can be no flag's value, or None. Values of other types pass.

    Args:
        value: the value, or a list of values.
        several_lines: the text may have line breaks.
    """
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(text, (str, Path)):
            continue
        text = str(text)
        if not text.strip():
            return "is empty: give a value, or leave the flag out"
        if "\0" in text or (not several_lines and not text.isprintable() and any(char in text for char in "\n\r")):
            return f"{visible(text)[:80]!r} holds a line break or a null character: remove it"
        if any("\ud800" <= char <= "\udfff" for char in text):  # how Python holds bytes that are no UTF-8
            return f"{visible(text)[:80]} is not UTF-8: rename it, or give another"
    return None


def problems_of(
    flags: Any, fields: Iterable[Field[Any]], given: Mapping[str, str], methods: Sequence[str] | None
) -> list[str]:
    """Return every problem of a flag with its value, with the method, or with other flags.

    Args:
        flags: the values.
        fields: declarations of the flags.
        given: the given flags, with their origin.
        methods: the chosen method, or the two that are trained together; None if they are not known yet.
    """
    problems = []
    for item in fields:
        name, facts, value = item.name, item.metadata, getattr(flags, item.name)
        if bounds := out_of_bounds(item, value):
            problems.append(bounds)
        if wrong := unusable_text(value, facts["form"] != "name"):
            problems.append(f"--{name} {wrong}")
            continue
        if name not in given or value is None or value is False:
            continue
        if facts["methods"] and methods is not None and not set(methods) & set(facts["methods"]):
            choices = " or ".join(f"--use_{choice}" for choice in facts["methods"])
            problems.append(f"--{name} has no meaning for {' and '.join(methods)}: remove it, or choose {choices}")
            continue
        if facts["needs"] and not getattr(flags, facts["needs"]):
            problems.append(f"--{name} has no effect without --{facts['needs']}: remove it, or set that flag")
        if facts["check"] and (reason := facts["check"](flags)):
            shown = "" if isinstance(value, bool) else f" {str(value)[:200]}"
            problems.append(f"--{name}{shown}: {reason}")
    return problems


def wrong_model_problems(
    flags: Any, fields: Iterable[Field[Any]], given: Mapping[str, str], makes_pairs: bool
) -> list[str]:
    """Return the given flags that have no meaning for this kind of model.

    Args:
        flags: the values.
        fields: declarations of the flags.
        given: the given flags, with their origin.
        makes_pairs: the model is an encoder–decoder.
    """
    kinds = ("encoder–decoders", "a causal language model"), ("causal language models", "an encoder–decoder")
    meant, this = kinds[makes_pairs]
    return [
        f"--{item.name} is for {meant}, and this is {this}: remove it"
        for item in fields
        if item.metadata["causal_only" if makes_pairs else "pairs_only"]
        and item.name in given
        and getattr(flags, item.name)
    ]
