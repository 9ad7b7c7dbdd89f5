"""Standard output and error that don't end a tool: in any encoding, closed, without a reader, on a full disk."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LastingStream:
    """A standard stream that outlives its reader: what nobody can read any more, or no disk can hold, is dropped.

    A run of hours must not end because `| head` has seen enough.
    """

    def __init__(self, stream: Any) -> None:
        """Wrap a stream."""
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        try:
            self.stream.write(text)
        except OSError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is waiting."""
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Send to nowhere what is written from now on, by libraries and at Python's end too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        """Return anything else from the stream."""
        return getattr(self.stream, name)


@contextmanager
def standard_streams(lasting: bool) -> Iterator[None]:
    """Make standard output and error usable for a block.

    A stream that was closed becomes one to nowhere. A character that the terminal's encoding lacks is written as an
    escape.

    Args:
        lasting: both outlive their readers.
    """
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, LastingStream(stream) if lasting else stream)
    try:
        yield
    finally:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            if stream is not None:  # a closed one stays replaced: the last words need it
                setattr(sys, name, stream)
