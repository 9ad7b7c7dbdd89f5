"""Bounds on the time and memory that a user's template or regular expression may take."""

from __future__ import annotations

import os
import resource
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from open_instruct.errors import InputError, input_faults

SECONDS = 10.0  # of this process's CPU time, so that a busy machine changes nothing; real ones take milliseconds
MEMORY = 1 << 30  # bytes beyond what the process has
PATTERN_SECONDS = 1.0  # for one regular expression on the names of all layers; real ones take milliseconds


@contextmanager
def limited_time(what: str, remedy: str, seconds: float | None = None) -> Iterator[None]:
    """Stop a block of pure Python, or of `re`, that computes for ever.

    Uses the process's virtual timer, whose signal reaches the main thread only: in other threads, and within another
    such block, nothing is limited. `re` looks for signals while it searches.

    Args:
        what: the input that the block evaluates, as the user knows it.
        remedy: what the user can do.
        seconds: CPU seconds that the block may take; None: `SECONDS`.

    Raises:
        InputError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    seconds = SECONDS if seconds is None else seconds

    def stop(number: int, frame: FrameType | None) -> None:
        raise InputError(f"{what} can't be used (it was still computing after {seconds:g} s): {remedy}")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def limited_memory(num_bytes: int = MEMORY) -> Iterator[None]:
    """Let a block raise a MemoryError where it asks for more than `num_bytes` of new memory.

    Without it `{{ 'a' * 10**11 }}` would bring the machine down. Systems without /proc have no such bound.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bounds = [bound for bound in before if bound != resource.RLIM_INFINITY]
        most = min([pages * os.sysconf("SC_PAGE_SIZE") + num_bytes, *bounds])
        resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def evaluating_input(what: str, remedy: str, seconds: float | None = None) -> Iterator[None]:
    """Evaluate what a user wrote, with all limits: whatever it raises, or never finishes, is one line.

    Args:
        what: the input, as the user knows it.
        remedy: what the user can do.
        seconds: CPU seconds that the block may take; None: `SECONDS`.

    Raises:
        InputError: it raised an error, took longer, or wanted more memory.
    """
    with limited_time(what, remedy, seconds), input_faults(what, remedy), limited_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python's parsers, about expressions that may mean something else one day
        yield
