"""Signals that ask a run to stop: it writes a checkpoint, and exits with a code on which launchers requeue it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

PREEMPTED = 75  # exit code: sysexits' EX_TEMPFAIL, "try again later"; launchers requeue on it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # from a terminal or launcher; from SLURM before a time limit


class Preempted(Exception):
    """A signal stopped the run, which has written a checkpoint; the message names the signal and the step."""


class StopRequest:
    """Remembers a signal that asks the run to stop; the loop checks it after each step."""

    def __init__(self) -> None:
        """Start without a request."""
        self.name: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        """Install the handlers."""
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        """Put the former handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore further signals: this process is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
