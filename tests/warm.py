"""Processes whose libraries are imported already: a test that starts many waits milliseconds for each, not seconds.

They are real processes, forked from a server that has imported libraries, none of the project, and computed nothing: so
no thread of it holds a lock for which a child would wait. What a start costs or does in its imports needs a cold one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context("forkserver")  # one server for all tests of a process
CONTEXT.set_forkserver_preload(["tests.warm_libraries"])


class WarmProcess:
    """A Python script in a process of its own, with the methods of subprocess.Popen that tests use."""

    def __init__(
        self, script: Path, words: Sequence[str], cwd: Path, environment: Mapping[str, str], file_size: int | None
    ) -> None:
        """Start it; see `start`."""
        self.args = [str(script), *words]
        self.outputs = [tempfile.NamedTemporaryFile("r", errors="replace") for _ in range(2)]  # noqa: SIM115
        names = [output.name for output in self.outputs]
        self.process = CONTEXT.Process(target=_run, args=(self.args, str(cwd), dict(environment), names, file_size))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        return self.process.exitcode

    def wait(self) -> int | None:
        """Wait for its end; returns its exit code."""
        self.process.join()
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; returns what it wrote to standard output and standard error."""
        self.process.join(timeout)
        out, err = (output.read() for output in self.outputs)
        assert self.process.exitcode is not None, (out, err)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.process.kill()

    def terminate(self) -> None:
        """Ask it to end."""
        self.process.terminate()


def start(script: Path, *words: str, cwd: Path = ROOT, file_size: int | None = None, **environment: str) -> WarmProcess:
    """Start a script as the main program of a process, in a session of its own.

    Args:
        script: its file.
        words: its command line.
        cwd: folder in which it runs.
        file_size: the most bytes that it may write to a file; None: unlimited.
        environment: variables beside those of this process.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return WarmProcess(script, words, cwd, variables, file_size)


def run(script: Path, *words: str, cwd: Path = ROOT, **environment: str) -> CompletedProcess[str]:
    """Run a script to its end; see `start`."""
    return _result([start(script, *words, cwd=cwd, **environment)])[0]


def start_together(
    script: Path, ranks: Sequence[Sequence[str]], cwd: Path = ROOT, **environment: str
) -> list[WarmProcess]:
    """Start a script in processes that find each other, as torch.distributed.run does on one machine.

    Args:
        script: its file.
        ranks: the command line of each process.
        cwd: folder in which they run.
        environment: variables beside those of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(ranks)), **environment}
    shared |= {"LOCAL_WORLD_SIZE": str(len(ranks)), "GROUP_RANK": "0"}
    return [
        start(script, *words, cwd=cwd, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, words in enumerate(ranks)
    ]


def run_together(
    script: Path, ranks: Sequence[Sequence[str]], cwd: Path = ROOT, **environment: str
) -> list[CompletedProcess[str]]:
    """Run a script in processes that find each other, to their ends; see `start_together`."""
    return _result(start_together(script, ranks, cwd, **environment))


def _result(started: list[WarmProcess]) -> list[CompletedProcess[str]]:
    """Wait for the end of all."""
    outputs = [process.communicate() for process in started]
    return [
        CompletedProcess(process.args, process.wait() or 0, *output)
        for process, output in zip(started, outputs, strict=True)
    ]


def _run(args: list[str], cwd: str, environment: dict[str, str], outputs: list[str], file_size: int | None) -> None:
    """Be the process: what a fresh one would have, and what the server gave this one otherwise."""
    os.setsid()
    os.chdir(cwd)
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = args
    sys.path[:0] = [str(Path(args[0]).parent), environment["PYTHONPATH"]]
    code: Any = 0
    try:
        runpy.run_path(args[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    # What the end of an interpreter does, in its order: a pool ends its workers before they are waited for.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
