"""Files that appear complete or not at all, checksums, and checks of output paths."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from open_instruct.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AtomicFile:
    """Write a big file: a thread compresses, writes and hashes while the caller makes the next bytes.

    The bytes go to a temporary file beside `path`. Leaving the `with` block normally flushes it to the disk and renames
    it; any error, Ctrl-C included, removes it. `write_text` gives small files the same guarantees without a thread.

    Args:
        path: the file to write; its folder is made if it is missing.
        compression: None, "gzip" or "zstd".
        bytes_needed: called when the disk is full; returns about how many bytes the complete file would take.

    Raises:
        InputError: the disk is full.
    """

    def __init__(
        self, path: Path, compression: str | None = None, bytes_needed: Callable[[], int] | None = None
    ) -> None:
        """Remember the names; nothing is created yet."""
        self.path = path
        self.compression = compression
        self.num_bytes = 0  # before compression
        self.hash = hashlib.sha256()
        self.replacement = _replacing(path, bytes_needed)
        self.queue: Queue[bytes | None] = Queue(maxsize=4)  # bounded, so that a slow disk slows the caller down
        self.failure: Exception | None = None
        self.worker = Thread(target=self._write_queue, daemon=True)

    def _write_queue(self) -> None:
        # The first bytes are waited for before the file is created: an interrupt that arrives before the `with` block
        # is entered, so that `__exit__` will not run, then leaves nothing behind.
        data = self.queue.get()
        try:
            with ExitStack() as stack:
                sink: Any = stack.enter_context(_create(self.working))
                if self.compression:
                    sink = stack.enter_context(pa.CompressedOutputStream(sink, self.compression))
                while data is not None:
                    sink.write(data)
                    self.hash.update(data)
                    data = self.queue.get()
        except Exception as error:  # of whatever type: the caller's thread raises it again
            self.failure = error
            while data is not None:  # empty the queue, else the caller's `write` would block on it for ever
                data = self.queue.get()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        if self.failure is not None:
            raise self.failure
        self.queue.put(data)
        self.num_bytes += len(data)

    def __enter__(self) -> AtomicFile:
        """Start the thread that writes."""
        self.working = self.replacement.__enter__()
        self.worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Rename the temporary file, or remove it after an error."""
        try:
            self.queue.put(None)
            self.worker.join()
        except BaseException as interrupt:  # Ctrl-C while waiting for the disk
            kind, error = None, interrupt
        error = error or self.failure
        if error is None:
            self.replacement.__exit__(None, None, None)
            return
        self.replacement.__exit__(type(error), error, error.__traceback__)
        if kind is None:  # the `with` block itself ended without an error
            raise error

    @property
    def sha256(self) -> str:
        """Checksum of the content before compression, in hexadecimal; valid after the `with` block."""
        return self.hash.hexdigest()


@contextmanager
def _replacing(path: Path, bytes_needed: Callable[[], int] | None = None) -> Iterator[Path]:
    """Give a temporary name beside `path`, to be created with `_create`; then rename it to `path`, or remove it.

    The name is random, as a killed process leaves its file behind, and in a container the next one has the same id.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.writing")
    try:
        yield working
        flush(working)
        os.replace(working, path)
        flush(path.parent)  # else a power cut may undo the renaming
    except BaseException as error:
        working.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            size = f", about {bytes_needed() / 1e6:,.0f} MB are needed" if bytes_needed else ""
            raise InputError(
                f"no space left for {path}{size}: free some, or write elsewhere; nothing was left behind"
            ) from None
        raise


def _create(path: Path) -> BinaryIO:
    """Open a new file for writing, with the permissions that the umask gives.

    Raises:
        InputError: the name is taken. A symbolic link counts too, so none that was planted there is ever followed.
    """
    try:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb")
    except FileExistsError:
        raise InputError(
            f"temporary file {path} existed before it was made, so nothing was written: try again"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a small file, in UTF-8, that is either the old one or the new one, never half.

    Half of a surrogate pair, which UTF-8 can't hold, is written as the escape that JSON has for it.

    Raises:
        InputError: the disk is full.
    """
    data = text.encode(errors="backslashreplace")
    with _replacing(path) as working, _create(working) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, in a file that is either the old one or the new one, never half."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON that every reader accepts: JSON knows no NaN and no infinity, which become null."""
    return json.dumps(finite_values(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def finite_values(value: Any) -> Any:
    """Return a value with None for each number that is not finite, also within lists and dictionaries."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite_values(item) for name, item in value.items()}
    return [finite_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def sha256(path: Path) -> str:
    """Return the checksum of a file's content, in hexadecimal; what is appended meanwhile is left out."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while block := file.read(min(left, 1 << 24)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Make the operating system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, sources: list[Path], overwrite: bool) -> None:
    """Raise an InputError if `path` is a folder, one of the `sources`, or a file that may not be replaced."""
    if any(path.resolve() == source.resolve() for source in sources):
        raise InputError(f"output {path} is one of the inputs: name another file with -o")
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists: pass --overwrite to replace it, or name another file")


def check_result_folder(name: str | None, result: str) -> None:
    """Make a folder for results before anything is computed.

    Args:
        name: the folder; None: no result will be written, so nothing is done.
        result: name of the file that marks a result as complete, `write_result`'s KIND.json.

    Raises:
        InputError: the folder can't be made, or holds a result already.
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
    """Write a result as a page, a picture and numbers into a folder that `check_result_folder` made.

    KIND.json is written last: its presence marks the result as complete.

    Args:
        name: the folder; None: nothing is written.
        kind: stem of the three files: KIND.md, KIND.png and KIND.json.
        text: the page, in Markdown.
        plot: draws `result` into the PNG whose path it is given.
        result: the numbers.
    """
    if name is None:
        return
    folder = Path(name)
    (folder / f"{kind}.md").write_text(text + "\n", encoding="utf-8")
    plot(result, folder / f"{kind}.png")
    write_json(folder / f"{kind}.json", result)
