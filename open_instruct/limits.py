"""Bounds on the time that a user's template or regular expression may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from open_instruct.errors import InputError

SECONDS = 10.0  # of this process's CPU time, so that a busy machine changes nothing; real ones take milliseconds


@contextmanager
def limited_time(what: str, remedy: str, seconds: float = SECONDS) -> Iterator[None]:
    """Stop a block of pure Python, or of `re`, that computes for ever.

    Uses the process's virtual timer, whose signal reaches the main thread only: in other threads, and within another
    such block, nothing is limited. `re` looks for signals while it searches.

    Args:
        what: the input that the block evaluates, as the user knows it.
        remedy: what the user can do.
        seconds: CPU seconds that the block may take.

    Raises:
        InputError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise InputError(f"{what} can't be used (it was still computing after {seconds:g} s): {remedy}")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
