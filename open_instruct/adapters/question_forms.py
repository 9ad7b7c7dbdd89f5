"""How the rows of a tool's file become questions: as the flags say, and else as in the adapters' training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from open_instruct.adapters.folders import AdapterFolder
from open_instruct.command_line import at_least
from open_instruct.data import reading
from open_instruct.data.bad_rows import BadRows
from open_instruct.data.rendering import Rendering
from open_instruct.data.rendering_flags import check_rendering, columns_of, from_record
from open_instruct.data.templates import MissingField, read_templates
from open_instruct.errors import InputError, input_faults, visible
from open_instruct.flags.combinations import bad_columns
from open_instruct.flags.data import COLUMNS, MAX_SHOTS, SHOTS, TEMPLATE

NONE = "none"  # the value of a flag that leaves out what the adapter was trained with
LEAVE_OUT = "--columns none, --template none and --shots 0 leave that out"
FORM_FLAGS = ("columns", "template", "shots", "shots_file")


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, for tools that read questions."""
    add = parser.add_argument_group("questions from columns (docs/data.md); unset: as in the adapter's training")
    add.add_argument("--columns", nargs="+", metavar="NAME=COLUMN", help=f"{COLUMNS}; none: rows have a known form")
    add.add_argument("--template", metavar="FILE", help=f"{TEMPLATE}; none: the question as it is")
    add.add_argument("--shots", type=at_least(0, MAX_SHOTS), help=SHOTS)
    add.add_argument(
        "--shots_file", metavar="FILE", help="file of the rows that --shots draws from; unset: the adapter's training"
    )


def form_of_questions(
    folders: Sequence[AdapterFolder],
    columns: Sequence[str] | None = None,
    template: str | None = None,
    shots: int | None = None,
    shots_file: str | None = None,
    seed: int = 42,
    answered: bool = False,
) -> Rendering | None:
    """Return how rows become questions; None: they have a known form.

    A line on the standard error names what is taken from an adapter.

    Args:
        folders: the adapters.
        columns: words of --columns; None: as in the adapters' training, ["none"]: none.
        template: file of --template; None and "none" likewise.
        shots: exemplars before each question; None likewise.
        shots_file: rows from which exemplars are drawn; None: those of the adapters' training.
        seed: of what is drawn, where it is not taken from an adapter.
        answered: rows need an answer.

    Raises:
        InputError: a flag can't be used, or the adapters were trained on different forms.
    """
    if columns and columns != [NONE] and (problem := bad_columns(list(columns))):
        raise InputError(f"--columns {' '.join(columns)[:200]}: {problem}")
    if shots_file and shots == 0:
        raise InputError(f"--shots_file {shots_file} has no effect with --shots 0: drop one of the two flags")
    given = (columns is not None, template is not None, shots is not None)
    trained = None if all(given) and (shots == 0 or shots_file) else trained_form(folders, any(given))
    made = replace(trained or Rendering(seed=seed), all_templates=False)
    if columns is not None:
        made = replace(made, columns=() if columns == [NONE] else columns_of(columns))
    if template is not None:
        made = replace(made, templates=() if template == NONE else read_templates(template))
    if shots is not None:
        made = replace(made, num_shots=shots, exemplars=made.exemplars if shots else ())
    if shots_file and not made.num_shots:
        raise InputError(f"--shots_file {shots_file} has no effect without --shots: remove it, or add that")
    if made.columns or made.templates:
        check_rendering(made, answered)
    if made.num_shots:
        made = with_exemplars(made, shots_file, seed)
    if not (made.columns or made.templates or made.num_shots):
        return None
    if trained and not all(given):
        line = f"questions as in the adapter's training: {made.describe()} ({LEAVE_OUT})"
        print(visible(line), file=sys.stderr)
    return made


def trained_form(folders: Sequence[AdapterFolder], any_given: bool) -> Rendering | None:
    """Return the form of rows on which the adapters were trained, where their runs recorded one.

    Args:
        folders: the adapters.
        any_given: a flag says a part of it.

    Raises:
        InputError: they differ, or a record is damaged.
    """
    forms: dict[str, Rendering | None] = {}
    for folder in folders:
        if not folder.record:
            continue
        with input_faults(f"adapter {folder.name}: its run.json", "repair the file, or copy the adapter again"):
            recorded: Any = folder.record.get("rendering")
            forms.setdefault(json.dumps(recorded, sort_keys=True), from_record(recorded) if recorded else None)
    if len(forms) > 1:
        remedy = "all of --columns, --template and --shots" if any_given else "--columns, --template and --shots"
        raise InputError(
            f"the adapters {', '.join(folder.name for folder in folders)} were trained on questions in different forms "
            f"(columns, templates or exemplars): use them one at a time, or give {remedy} for all"
        )
    return next(iter(forms.values()), None)


def say_as_it_is(folders: Sequence[AdapterFolder]) -> None:
    """Say that a typed question is asked as it is, where an adapter was trained on questions of another form.

    Raises:
        InputError: a record is damaged, or the adapters' differ.
    """
    form = trained_form(folders, any_given=False)
    if form is not None:
        print(visible(f"asked as it is; the adapter was trained with {form.describe()}"), file=sys.stderr)


def with_exemplars(form: Rendering, file: str | None, seed: int) -> Rendering:
    """Return a form with exemplars: those of a file, or those that it has.

    Raises:
        InputError: there are none, or too few, or they lack a column.
    """
    remedy = "name a file of rows with --shots_file"
    if file:
        rows = reading.read_files(reading.files_of(file), BadRows(skip=True))
        return replace(form, seed=seed).with_exemplars(rows, f"--shots_file {file}")
    if not form.exemplars:
        raise InputError(f"--shots {form.num_shots} needs rows to draw exemplars from: {remedy}")
    if len(form.exemplars) <= form.num_shots:
        raise InputError(
            f"--shots {form.num_shots}: the adapter's training kept {len(form.exemplars)} exemplars, and one may be "
            f"the question itself: give fewer, or {remedy}"
        )
    what = "an exemplar of the adapter's training"
    try:
        with input_faults(what, remedy):
            for exemplar in form.exemplars:
                for template in form.templates or [None]:
                    form.question(what, exemplar.values, template)
    except MissingField as error:
        raise InputError(f"{error}; or {remedy}") from None
    return form
