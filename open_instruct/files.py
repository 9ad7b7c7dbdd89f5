"""Files that appear whole or not at all, with a manifest beside them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

import pyarrow as pa

from open_instruct.errors import InputError


class AtomicFile:
    """Writes to a temporary name beside `path`; leaving the `with` block normally flushes to disk and renames.

    Any error, Ctrl-C included, removes the temporary file. Writing and the content's sha256 have a thread of their own.

    Args:
        path: of the file.
        compression: None, "gzip" or "zstd".
        needed: asked on a full disk for the number of bytes that the whole file would take.
    """

    def __init__(self, path: Path, compression: str | None = None, needed: Callable[[], int] | None = None) -> None:
        """Remember the names; nothing is created yet."""
        self.path = path
        self.working = path.with_name(f".{path.name}.{os.getpid()}.writing")
        self.compression = compression
        self.needed = needed
        self.num_bytes = 0
        self.hash = hashlib.sha256()
        self.queue: Queue[bytes | None] = Queue(maxsize=4)
        self.failure: Exception | None = None
        self.worker = Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        data = (
            self.queue.get()
        )  # the file is created when the `with` block writes: an interrupt before it finds nothing to undo
        try:
            with ExitStack() as stack:
                sink = stack.enter_context(pa.OSFile(str(self.working), "wb"))
                if self.compression:
                    sink = stack.enter_context(pa.CompressedOutputStream(sink, self.compression))
                while data is not None:
                    sink.write(data)
                    self.hash.update(data)
                    data = self.queue.get()
        except Exception as error:  # whatever it is, the other thread must hear of it
            self.failure = error
            while data is not None:  # the other thread must not wait for room in the queue
                data = self.queue.get()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        if self.failure is not None:
            raise self.failure
        self.queue.put(data)
        self.num_bytes += len(data)

    def __enter__(self) -> AtomicFile:
        """Start the thread that writes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish or undo."""
        try:
            self.queue.put(None)
            self.worker.join()
            error = error or self.failure
            if error is None:
                flush(self.working)
                os.replace(self.working, self.path)
                flush(self.path.parent)
        except OSError as late:
            error = late
        finally:
            self.working.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = f", about {self.needed() / 1e6:,.0f} MB are needed" if self.needed else ""
            raise InputError(
                f"no space left for {self.path}{size}: free some, or write elsewhere; nothing was left behind"
            ) from None
        if error is not None and kind is None:
            raise error

    @property
    def sha256(self) -> str:
        """Of the content before compression; valid after the `with` block."""
        return self.hash.hexdigest()


def sha256(path: Path) -> str:
    """Return the checksum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Make the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is either the old one or the new one, never half."""
    with AtomicFile(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def check_output(path: Path, sources: list[Path], overwrite: bool) -> None:
    """Refuse to write over a source, or over anything without being asked to."""
    if any(path.resolve() == source.resolve() for source in sources):
        raise InputError(f"output {path} is one of the inputs: name another file with -o")
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists: pass --overwrite to replace it, or name another file")


def check_result_folder(name: str | None, result: str) -> None:
    """Make a folder for results before anything is computed; None: nothing is written.

    Raises:
        InputError: it can't be made, or holds a result already.
    """
    if name is None:
        return
    folder = Path(name)
    if (folder / result).exists():
        raise InputError(f"--output_dir {name} holds an {Path(result).stem}: name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {name} can't be made ({error.strerror}): name another folder") from None


def write_result(
    name: str | None, kind: str, text: str, plot: Callable[[dict[str, Any], Path], None], result: dict[str, Any]
) -> None:
    """Text, picture and numbers of a result, into a folder that `check_result_folder` made; the numbers last, as they mark it as whole."""
    if name is None:
        return
    folder = Path(name)
    (folder / f"{kind}.md").write_text(text + "\n", encoding="utf-8")
    plot(result, folder / f"{kind}.png")
    write_json(folder / f"{kind}.json", result)
