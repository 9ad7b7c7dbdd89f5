"""Signals that arrive while a tool imports its libraries: the tool ends at once, with a line.

Imported first by every tool. An exception raised in the middle of an import, as Python's own handler of Ctrl-C raises
one, leaves half-imported modules, of which libraries then complain in tracebacks of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

PREEMPTED = 75  # exit code: sysexits' EX_TEMPFAIL, "try again later"; launchers requeue on it
INTERRUPTED = 130  # as shells report Ctrl-C
TRAINER = "finetune_peft.py"
TOOLS = (
    TRAINER,
    "study_peft.py",
    "generate_peft.py",
    "evaluate_peft.py",
    "inspect_peft.py",
    "merge_peft.py",
    "merge_lora.py",
    "arrow2json.py",
    "sample_subsets.py",
)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process with a line: nothing has been written yet."""
    name = signal.Signals(number).name
    text, code = "interrupted: nothing was written yet", INTERRUPTED
    if number != signal.SIGINT and tool() == TRAINER:
        text, code = f"stopped by {name} before the first step: nothing was trained yet", PREEMPTED
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())
    os._exit(code)


def tool() -> str | None:
    """Return the name of the tool that this process runs; None in a process of another kind."""
    name = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    return name if name in TOOLS else None


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let signals end the process at once during a block that only imports."""
    if tool() is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        install()
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def as_python_does() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt during a block, now that the tool is imported."""
    before = signal.getsignal(signal.SIGINT)
    if before is not end_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former(before))


def former(handler: Any) -> Any:
    """Return what to put back after a tool's own handler: signals no longer matter to a process about to end."""
    return signal.SIG_IGN if handler is end_at_once else handler or signal.SIG_DFL


def install() -> None:
    """Let signals end the process at once, until somebody else handles them. Those that are ignored stay ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if tool() == TRAINER else [])]
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_at_once)


def end_process(code: int) -> NoReturn:
    """End the process of a tool that converts data.

    After an interruption, threads of Arrow may still be at work on what the interpreter's end takes down. One of some
    hundred interrupted conversions ended with a segmentation fault. All files are closed by then.
    """
    if code == INTERRUPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if tool():
    install()
