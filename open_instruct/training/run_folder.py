"""Which files of a run's folder are the run's own: run.json lists them, and no others are ever replaced or removed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from open_instruct.adapters.inspection import START
from open_instruct.errors import InputError
from open_instruct.files import write_json
from open_instruct.methods.prompt_and_lora import PARTS
from open_instruct.temporary import remove_dead
from open_instruct.training.tracking import METRICS

RUN, SUMMARY, LOSS_PLOT, CHECKPOINTS = "run.json", "summary.json", "loss.png", "checkpoints"
RATES, RATES_PLOT = "auto_lr.json", "auto_lr.png"
NETWORK = "trained.safetensors"  # beside an adapter whose network (P-tuning, projected prefix) PEFT's format leaves out
RECORDS = (RUN, METRICS, SUMMARY, LOSS_PLOT, START, RATES, RATES_PLOT)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", NETWORK)
ADAPTERS = tuple(f"{part}/{name}" for part in PARTS for name in ADAPTER[:2])  # that were trained together
MODEL = ("config.json", "generation_config.json", "model*.safetensors*")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)
LISTED = "files"  # key of run.json
STEP = re.compile(r"step_(\d+)", re.ASCII)
MADE = re.compile(rf"{CHECKPOINTS}/(step_\d+|\.step_\d+\.writing)", re.ASCII)  # what a run makes below a subfolder
CHECKPOINT_FILES = ("COMPLETED", "state.json", "trained.safetensors", "best.safetensors", "optimizer*.pt")
FORMER = "former"  # begins the folders in which results stand aside


class RunFolder:
    """A run's folder, with its record and the names of what the run, or the one that it replaces, wrote there.

    Only the main process changes anything, under the folder's lock.

    Args:
        path: the folder.
        record: content of run.json, without the names.
        files: names below the folder. A checkpoint is one name.
    """

    def __init__(self, path: Path, record: Mapping[str, Any] | None = None, files: Iterable[str] = ()) -> None:
        """Remember the arguments; nothing is written yet."""
        self.path = path
        self.record = dict(record or {})
        self.files = set(files)

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read who owns what; nothing is the run's where run.json is missing, or another program's."""
        if not (path / RUN).is_file():  # reading a pipe would wait for ever
            return cls(path)
        try:
            record = json.loads((path / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return cls(path)
        if not isinstance(record, dict) or not isinstance(record.get("flags"), dict) or "versions" not in record:
            return cls(path)
        listed = record.pop(LISTED, None)
        if not isinstance(listed, list):
            return cls(path, record, files_of_old(path, record))
        # A name could lead elsewhere, if somebody else wrote it.
        safe = (name for name in listed if isinstance(name, str) and is_below(name))
        return cls(path, record, safe)

    def owns(self, name: str) -> bool:
        """Return whether a name is of the run's own, and no link or pipe is in its place, which others put there."""
        path = self.path / name
        return name in self.files and not path.is_symlink() and (path.is_file() or path.is_dir() or not path.exists())

    def has(self, *patterns: str) -> list[str]:
        """Return the run's own files and checkpoints that are there, and match one of the patterns (none: all)."""
        there = [name for name in sorted(self.files) if self.owns(name) and (self.path / name).exists()]
        return [
            name for name in there if not patterns or any(PurePosixPath(name).match(pattern) for pattern in patterns)
        ]

    def foreign(self, after: int = -1) -> list[str]:
        """Return what is not the run's and would be replaced by it, or taken for a part of it.

        Args:
            after: step from which the run resumes; other programs' checkpoints up to it are no obstacle.
        """
        patterns = (*RECORDS, *ADAPTER, *ADAPTERS, *MODEL, *TOKENIZER)
        names = {path.relative_to(self.path).as_posix() for pattern in patterns for path in self.path.glob(pattern)}
        names |= {name for name in patterns if (self.path / name).is_symlink()}  # `glob` leaves out what dangles
        checkpoints = self.path / CHECKPOINTS
        if checkpoints.is_dir():
            steps = {path.name: STEP.fullmatch(path.name) for path in checkpoints.iterdir()}
            names |= {f"{CHECKPOINTS}/{name}" for name, match in steps.items() if match and int(match[1]) > after}
        elif checkpoints.is_symlink() or checkpoints.exists():
            names.add(CHECKPOINTS)
        return sorted(name for name in names if not self.owns(name))

    def later(self, step: int) -> list[str]:
        """Return the run's own checkpoints after a step, finished or not."""
        return [name for name in self.has(f"{CHECKPOINTS}/step_*") if step_number(name) > step]

    def start(self, record: Mapping[str, Any], *names: str) -> None:
        """Write the record of a run that begins or goes on, with the names that it is going to write."""
        self.record = dict(record)
        self.path.mkdir(parents=True, exist_ok=True)
        remove_dead(self.path)
        self.remove(*self.has(f"{CHECKPOINTS}/.step_*.writing"))
        self.files = {name for name in self.files if exists(self.path / name)}
        self.claim(RUN, *names)
        self.write()

    def claim(self, *names: str) -> None:
        """Note what the run is going to write, before it does.

        Raises:
            InputError: something that is not the run's has such a name.
        """
        taken = [name for name in names if not self.owns(name) and exists(self.path / name)]
        if taken:
            raise InputError(f"{self.path} holds {named(taken)}, which the run did not make: move it away")
        if not self.files.issuperset(names):
            self.files.update(names)
            self.write()

    def write(self) -> None:
        """Write run.json."""
        write_json(self.path / RUN, {**self.record, LISTED: sorted(self.files)})

    def remove(self, *names: str) -> None:
        """Remove files and checkpoints of the run. Whatever else lies in a checkpoint's folder stays."""
        for name in names:
            path = self.path / name
            if not self.owns(name):
                continue
            if not path.is_dir():
                path.unlink(missing_ok=True)
            elif path.name.startswith("."):  # a checkpoint that was never finished
                shutil.rmtree(path)
            else:
                remove_checkpoint(path)
            if not path.exists():
                self.files.discard(name)
        for folder in (self.path / name for name in (CHECKPOINTS, *PARTS)):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def clear(self) -> None:
        """Remove all that is the run's, its record last: a kill before that leaves the rest known as the run's."""
        self.remove(*(name for name in self.has() if name != RUN))
        self.remove(RUN)

    def set_aside(self, names: Iterable[str], copies: Iterable[str] = ()) -> Path:
        """Move files and checkpoints into a new folder below this one, and copy others.

        Returns:
            The new folder.
        """
        number = 1
        while exists(self.path / f"{FORMER}-{number}"):
            number += 1
        aside = self.path / f"{FORMER}-{number}"
        aside.mkdir()
        for name in copies:
            if (self.path / name).is_file():
                shutil.copy2(self.path / name, aside / name)
        for name in names:
            (aside / name).parent.mkdir(exist_ok=True)
            shutil.move(self.path / name, aside / name)  # `checkpoints` may be a link to another disk
            self.files.discard(name)
        return aside


def files_of_old(folder: Path, record: Mapping[str, Any]) -> set[str]:
    """Return what a run made whose run.json names no files, as older versions wrote it."""
    kinds = MODEL if record.get("method") == "full" else ADAPTER
    names = {path.name for pattern in (*RECORDS, *kinds, *TOKENIZER) for path in folder.glob(pattern)}
    made = [path for path in (folder / CHECKPOINTS).glob("*step_*") if MADE.fullmatch(f"{CHECKPOINTS}/{path.name}")]
    return names | {
        f"{CHECKPOINTS}/{path.name}" for path in made if path.name[0] == "." or (path / "state.json").exists()
    }


def is_below(name: str) -> bool:
    """Return whether a name is one that a run writes: a file of its folder, or a checkpoint."""
    if "/" in name:
        return name in ADAPTERS or bool(MADE.fullmatch(name))
    return name not in ("", ".", "..", CHECKPOINTS)


def step_number(name: str) -> int:
    """Return the step of a checkpoint."""
    match = STEP.fullmatch(PurePosixPath(name).name)
    return int(match[1]) if match else -1


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint's files, and its folder if nothing else is left in it."""
    try:
        listed = json.loads((path / CHECKPOINT_FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        listed = {}
    names = {name for name in listed if is_below(name)} if isinstance(listed, dict) else set()
    names |= {item.name for pattern in CHECKPOINT_FILES for item in path.glob(pattern)}
    for item in sorted(path / name for name in names):  # the mark of completeness is first: half of it is no checkpoint
        if item.is_file():
            item.unlink()
    if not any(path.iterdir()):
        path.rmdir()


def exists(path: Path) -> bool:
    """Return whether a path is taken, by a link to nothing too."""
    return path.is_symlink() or path.exists()


def named(names: list[str], most: int = 3) -> str:
    """Return some names in words, and how many there are besides."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
