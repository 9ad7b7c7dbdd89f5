"""Commands in forked processes: the parent has imported everything, so a start costs milliseconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from open_instruct import limits

CPU_SECONDS = 60  # a good run takes two
IDLE_SECONDS = 20  # asleep for so long without computing at all: nothing will ever wake it
MEMORY = 6 << 30  # bytes of address space beyond the parent's

MODULES = {
    "finetune_peft": "open_instruct.finetune_peft",
    "generate_peft": "open_instruct.generate_peft",
    "evaluate_peft": "open_instruct.evaluate_peft",
    "merge_peft": "open_instruct.merge_peft",
    "inspect_peft": "open_instruct.inspect_peft",
    "study_peft": "open_instruct.study_peft",
    "arrow2json": "arrow2json",
    "sample_subsets": "sample_subsets",
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int  # negative: the signal that ended it
    out: str
    err: str
    hung: bool
    seconds: float  # of CPU

    @property
    def lines(self) -> list[str]:
        """Its error lines."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def preload() -> None:
    """Import what the commands import, once; and let them lose patience sooner."""
    limits.SECONDS = 1.0
    for module in (*MODULES.values(), "open_instruct.training.run", "open_instruct.adapters.served"):
        importlib.import_module(module)
    for module in ("merging", "evaluation", "inspection", "interactive", "answering"):
        importlib.import_module(f"open_instruct.adapters.{module}")
    for module in ("matplotlib.pyplot", "polars", "datasets", "torch._dynamo", "safetensors.torch"):
        importlib.import_module(module)
    for module in ("search", "report", "workers"):
        importlib.import_module(f"open_instruct.study.{module}")


def fork(command: str, words: Sequence[str], cwd: Path, stdin: bytes = b"", learn: bool = False) -> Outcome:
    """Run one command with its words in a forked process; `learn`: import here what it imported there."""
    (cwd / ".stdin").write_bytes(stdin)
    out, err = cwd / ".out", cwd / ".err"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = _child(command, words, cwd)
            if learn:
                (cwd / ".modules").write_text("\n".join(sys.modules))
        finally:
            os._exit(code)
    hung, pause, computed, since = False, 0.001, -1, time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        state, ticks = _progress(child)
        if state != "S" or ticks != computed:
            computed, since = ticks, time.monotonic()
        elif time.monotonic() > since + IDLE_SECONDS:
            hung = True
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    code = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    outcome = Outcome(code, _text(out), _text(err), hung or code == -signal.SIGXCPU, seconds)
    if learn:
        for module in (cwd / ".modules").read_text().splitlines():
            with contextlib.suppress(Exception):  # some modules only exist where others made them
                importlib.import_module(module)
    for path in (out, err, cwd / ".stdin", cwd / ".modules"):
        path.unlink(missing_ok=True)
    return outcome


def _progress(child: int) -> tuple[str, int]:
    """State of a process (S: asleep) and the ticks for which it has computed."""
    values = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return values[0], int(values[11]) + int(values[12])


def _text(path: Path) -> str:
    return path.read_bytes()[-100_000:].decode(errors="replace")


def _child(command: str, words: Sequence[str], cwd: Path) -> int:
    for number, name, flags in ((0, ".stdin", os.O_RDONLY), (1, ".out", os.O_WRONLY), (2, ".err", os.O_WRONLY)):
        os.dup2(os.open(cwd / name, flags | os.O_CREAT, 0o644), number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    os.chdir(cwd)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(
        io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    sys.argv = [command, *words]
    main: Callable[[Sequence[str]], int] = importlib.import_module(MODULES[command]).main
    try:
        code = main(list(words))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code or 0
