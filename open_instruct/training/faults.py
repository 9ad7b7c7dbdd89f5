"""What a run does when something outside it goes wrong: preemption, memory, lost processes, a full disk."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from open_instruct.errors import InputError
from open_instruct.training.checkpoint import WRITE_ERRORS

PREEMPTED = 75  # exit code: sysexits' EX_TEMPFAIL, "try again later"; launchers requeue on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of a terminal or launcher, and of SLURM before a time limit


class Preempted(Exception):
    """The run was told to stop, and has written a checkpoint; the message names it."""


class StopRequest:
    """Remembers a signal that asks the run to stop; the loop looks at it after each step."""

    def __init__(self) -> None:
        """Nothing is asked for yet."""
        self.name: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Listen."""
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        """Give the signals their former meaning."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """From now on, this process ends by itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def out_of_memory(accelerator: Any, step: int) -> InputError:
    """The error of a run that can't help itself."""
    return InputError(
        f"out of memory in step {step + 1} on process {accelerator.process_index}: set --gradient_checkpointing, lower "
        "--max_tokens_per_microbatch (padded: --per_device_train_batch_size, with more --gradient_accumulation_steps), or lower "
        "--max_seq_length; --dry_run estimates what a setting needs"
    )


def is_lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process ended or did not come in time."""
    words = (
        "connection closed by peer",
        "connection reset by peer",
        "timed out",
        "broken pipe",
        "socket",
        "remote process exited",
    )
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def lost_contact(error: BaseException, accelerator: Any, step: int) -> InputError:
    """The error of a process whose partners are gone."""
    cause = " ".join(str(error).split())[-200:]
    return InputError(
        f"process {accelerator.process_index} of {accelerator.num_processes} lost contact with the others in step {step + 1} ({cause}): "
        "another process ended, or needed longer than --timeout; continue with --resume_from_checkpoint"
    )


def save_somewhere(save: Callable[[Path], Any], folder: Path) -> Any:
    """Save into `folder`; where that fails, into a fresh folder of the system's temporary one, so that no result is lost.

    Raises:
        InputError: saved elsewhere, naming the place; or nowhere.
    """
    try:
        return save(folder)
    except WRITE_ERRORS as error:
        reason = " ".join(str(error).split())
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        save(elsewhere)
    except WRITE_ERRORS as error:
        raise InputError(
            f"the result could be saved neither in {folder} ({reason}) nor in the temporary folder ({error}): make room, and "
            "continue from the last checkpoint with --resume_from_checkpoint"
        ) from None
    raise InputError(f"the result could not be saved in {folder} ({reason}): it is in {elsewhere}, move it from there")


def warn(text: str) -> None:
    """A line on the error stream."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
