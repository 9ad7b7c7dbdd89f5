"""Flags, and records of runs → how rows become conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from open_instruct.data.rendering import ANSWER, OF_ANSWERS, PROMPT, SYSTEM, Exemplar, Rendering
from open_instruct.data.templates import Template, read_templates
from open_instruct.errors import InputError
from open_instruct.flags.data import MAX_SHOTS
from open_instruct.flags.optimization import MAX_SEED

# The flags of training, in the order of `rendering_of`'s arguments.
OF_RENDERING = ("columns", "template", "all_templates", "shots", "sft_messages_key")


def columns_of(words: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Return the (name, column) pairs of words as `prompt=dialogue`, which `flags.combinations` has checked."""
    return tuple((name, column) for name, _, column in (word.partition("=") for word in words or []))


def rendering_of(
    seed: int,
    columns: Sequence[str] | None = None,
    template: str | None = None,
    all_templates: bool = False,
    num_shots: int = 0,
    messages_key: str = "messages",
) -> Rendering | None:
    """Return what flags say, still without exemplars; None where they say nothing.

    Args:
        seed: of what is drawn.
        columns: words of --columns.
        template: file of --template.
        all_templates: see `Rendering`.
        num_shots: see `Rendering`.
        messages_key: see `Rendering`.

    Raises:
        InputError: the file can't be used, or the flags contradict each other.
    """
    templates = read_templates(template) if template else ()
    made = Rendering(columns_of(columns), templates, all_templates, num_shots, seed, (), messages_key)
    if not (made.columns or made.templates or made.num_shots):
        return None
    check_rendering(made, answered=True)
    return made


def check_rendering(rendering: Rendering, answered: bool) -> None:
    """Refuse parts that don't fit together.

    Args:
        rendering: what the flags say, or an adapter's record, or both.
        answered: rows need an answer.

    Raises:
        InputError: naming what is wrong.
    """
    columns, fields = dict(rendering.columns), rendering.fields
    if rendering.all_templates and len(rendering.templates) < 2:
        raise InputError("--all_templates has no effect with one template: remove it, or give several")
    if columns and answered and ANSWER not in columns:
        raise InputError("--columns names no answer: add answer=COLUMN")
    if columns and PROMPT not in columns and not rendering.templates:
        raise InputError("--columns names no question: add prompt=COLUMN, or a --template that writes it")
    hidden = {ANSWER, columns.get(ANSWER)} if columns else {*OF_ANSWERS, rendering.messages_key}
    for template in rendering.templates:
        leaked = next((name for name in template.fields if name in hidden), None)
        if leaked is not None:
            raise InputError(f"{template.described} writes {leaked}, which holds the answer: remove that field")
    unused = [name for name in columns if name not in (ANSWER, SYSTEM, *fields)]
    if unused and rendering.templates:
        raise InputError(
            f"--columns {unused[0]}={columns[unused[0]]} has no effect, as no template has the field {unused[0]} "
            f"(fields: {', '.join(fields)}): remove it"
        )
    if unused:
        raise InputError(
            f"--columns {unused[0]}={columns[unused[0]]} has no effect without a --template that names it: known "
            f"without one are {PROMPT}, {ANSWER} and {SYSTEM}"
        )


def from_record(record: Mapping[str, Any]) -> Rendering:
    """Return the rendering that `Rendering.record` described.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the record is damaged.
    """
    templates = tuple(Template(str(item["text"]), bool(item["is_jinja"])) for item in record["templates"])
    exemplars = tuple(Exemplar(dict(item["values"]), str(item["answer"])) for item in record["exemplars"])
    columns = tuple((str(name), str(column)) for name, column in record["columns"].items())
    shots, seed = int(record["shots"]), int(record["seed"])
    if not 0 <= shots <= MAX_SHOTS or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"its shots are {shots}, and its seed {seed}")
    return Rendering(columns, templates, bool(record["all_templates"]), shots, seed, exemplars)
