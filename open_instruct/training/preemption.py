"""Signals that ask a run to stop: it writes a checkpoint, and exits with a code on which launchers requeue it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from open_instruct.interrupts import PREEMPTED, as_python_does, former

__all__ = ["PREEMPTED", "Preempted", "RunGuard"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # from a terminal or launcher; from SLURM before a time limit


class Preempted(BaseException):
    """A signal stopped the run; the message says which, when, and how to go on.

    No `Exception`: it can be raised anywhere, and no handler of a library's errors may swallow it.
    """


class RunGuard(ExitStack):
    """What a run holds from its start to its end: the handlers of signals that ask it to stop, its folder's lock.

    Until `remember` is called nothing has been trained, and a signal raises `Preempted` wherever it arrives. From then
    on it is remembered, the loop looks for it after each step, and only `stoppable` blocks are left at once.
    """

    def __init__(self) -> None:
        """Start without a request."""
        super().__init__()
        self.signal: str | None = None  # name of the signal that was received
        self.raises = True

    def __enter__(self) -> RunGuard:
        """Install the handlers; leaving puts the former ones back."""
        super().__enter__()
        self.enter_context(as_python_does())
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in SIGNALS:
                self.callback(signal.signal, number, former(signal.signal(number, self._receive)))
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        if self.raises:
            self.raises = False  # launchers signal more than once
            raise Preempted(f"stopped by {self.signal} before the first step: nothing was trained yet")

    def remember(self) -> None:
        """Only remember signals from here on."""
        self.raises = False

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Leave the block at once when a signal arrives, or has arrived.

        Raises:
            Preempted: one has.
        """
        self.raises = True
        try:
            if self.signal:
                raise Preempted(f"stopped by {self.signal}")
            yield
        finally:
            self.raises = False
