"""The folder of a study: which files in it are the study's, and which process is at work there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from open_instruct.errors import input_faults
from open_instruct.files import check_path, write_bytes, write_json
from open_instruct.locks import LOCK, Occupied, locked
from open_instruct.study.config import Study

MARKER = ".open_instruct.study.json"  # names the study, which replaces FILES whenever it runs again
COPY = "study.yaml"
PICTURES = (
    "losses.png",
    "answers.png",
    "pareto_loss.png",
    "pareto_exact.png",
    "curves.png",
    "rates.png",
    "forgetting.png",
)
FILES = (COPY, "report.html", "report.md", "report.json", "trials.csv", *PICTURES)


@contextmanager
def opened(study: Study, shard: tuple[int, int]) -> Iterator[None]:
    """Lock the study's folder during the block, note what is the study's, and keep a copy of its file there.

    Each shard has a lock of its own, as shards run at the same time.

    Raises:
        InputError: the folder can't be written, or holds another study or files of others; or another process runs the
            same shard.
    """
    folder, what = study.output_dir, f"output_dir {study.output_dir}"
    suffix = "" if shard == (0, 1) else f"-{shard[0]}-of-{shard[1]}"
    check_path(folder, what)
    check_owner(study)
    with locked(folder / f"{LOCK}{suffix}", what):
        write_json(folder / MARKER, {"study": study.name})
        content = study.path.read_bytes()
        if not (folder / COPY).is_file() or (folder / COPY).read_bytes() != content:  # reading a pipe would never end
            write_bytes(folder / COPY, content)
        yield


def check_owner(study: Study) -> None:
    """Refuse a folder that holds another study, or files of others that the report would replace.

    Raises:
        Occupied: naming them.
    """
    folder = study.output_dir
    if is_ours(folder):
        with input_faults(f"{folder / MARKER}", "name another output_dir"):
            name = json.loads((folder / MARKER).read_text(encoding="utf-8"))["study"]
        if name != study.name:
            raise Occupied(f"output_dir {folder} holds the study {name}, this one is {study.name}: name another folder")
        return
    if (folder / "trials").is_dir() and (folder / COPY).is_file():  # made by an older version
        return
    foreign = [name for name in FILES if (folder / name).is_symlink() or (folder / name).exists()]
    if COPY in foreign and (folder / COPY).resolve() == study.path.resolve():  # the study's file lies in its folder
        foreign.remove(COPY)
    if foreign:
        names = ", ".join(foreign)
        raise Occupied(
            f"output_dir {folder} holds {names}, which no study made: move them away, or name another folder"
        )


def is_ours(folder: Path) -> bool:
    """Return whether a study was run in a folder."""
    return (folder / MARKER).is_file()
