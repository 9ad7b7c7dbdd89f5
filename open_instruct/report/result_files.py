"""A result in a folder: a page, numbers, a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_instruct.errors import InputError
from open_instruct.files import check_path, write_json, write_text
from open_instruct.locks import LOCK, locked

ENDINGS = ("md", "json", "png")


def check_result_folder(name: str | None, kind: str) -> None:
    """Refuse a folder in which a result can't be written, or that holds one.

    Args:
        name: the folder; None: no result will be written.
        kind: stem of the result's files, as of `write_result`.

    Raises:
        InputError: the folder can't be made, or holds a file of that name.
    """
    if name is None:
        return
    check_path(Path(name), f"--output_dir {name}")
    existing = [f"{kind}.{ending}" for ending in ENDINGS if os.path.lexists(Path(name, f"{kind}.{ending}"))]
    if existing:
        raise InputError(f"--output_dir {name} holds an {kind} ({', '.join(existing)}): name another folder")


@contextmanager
def result_folder(name: str | None, kind: str) -> Iterator[None]:
    """Make and lock the folder of a result while it is computed; see `check_result_folder`.

    Raises:
        InputError: another process computes one for it, or has just done so.
    """
    if name is None:
        yield
        return
    with locked(Path(name, f"{LOCK}.{kind}"), f"--output_dir {name}"):
        check_result_folder(name, kind)
        yield


def write_result(
    name: str | None, kind: str, text: str, plot: Callable[[dict[str, Any], Path], None], result: dict[str, Any]
) -> None:
    """Write a result as a page, numbers and a picture into a folder that `result_folder` holds.

    KIND.json marks the result as complete; the picture, which can fail, comes last.

    Args:
        name: the folder; None: nothing is written.
        kind: stem of the three files: KIND.md, KIND.json and KIND.png.
        text: the page, in Markdown.
        plot: draws `result` into the PNG whose path it is given.
        result: the numbers.
    """
    if name is None:
        return
    from open_instruct.report import pictures  # imports matplotlib

    folder = Path(name)
    write_text(folder / f"{kind}.md", text + "\n")
    write_json(folder / f"{kind}.json", result)
    with pictures.if_possible(folder / f"{kind}.png"):
        plot(result, folder / f"{kind}.png")
