"""The one exception that means "the user can mend this", and how a tool ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType


class InputError(ValueError):
    """Wrong input; the message names the value, the reason and the remedy. Entry points print it and exit with 2."""


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """Return an error's text without line breaks, cut at `longest` characters."""
    return " ".join(str(error).split())[:longest]


def warn(text: str) -> None:
    """Print a warning on the error stream."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_code(work: Callable[[], None], interrupted: str = "interrupted: nothing half-written remains") -> int:
    """Do a tool's work.

    Args:
        work: the work.
        interrupted: line printed after an interruption (Ctrl-C or SIGTERM).

    Returns:
        The exit code. 0: done; 2: wrong input, reported in one line; 130: interrupted.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0
