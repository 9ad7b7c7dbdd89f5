"""Files that appear complete or not at all, checksums, and checks of output paths."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

import pyarrow as pa

from open_instruct.errors import InputError, input_faults, warn
from open_instruct.temporary import create, forget, remove_dead, share, temporary_folder, temporary_name

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
                sink: Any = stack.enter_context(create(self.working))
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
    """Give a temporary name beside `path`, to be created with `create`; then rename it to `path`, or remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(path.parent)
    working = temporary_name(path)
    try:
        yield working
        flush(working)
        os.replace(working, path)
        flush(path.parent)  # else a power cut may undo the renaming
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        size = f", about {bytes_needed() / 1e6:,.0f} MB are needed" if bytes_needed else ""
        raise InputError(
            f"no space left for {path}{size}: free some, or write elsewhere; nothing was left behind"
        ) from None
    finally:
        forget(working)


@contextmanager
def replacing_by_name(path: Path) -> Iterator[Path]:
    """Give a path to a library that writes files by name; afterwards, what it wrote replaces `path` as a whole.

    The result has the umask's permissions, which safetensors would not give it.
    """
    with temporary_folder(path) as folder:
        yield folder / path.name
        share(folder)
        flush(folder / path.name)
        os.replace(folder / path.name, path)
        flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file, in UTF-8, that is either the old one or the new one, never half.

    Half of a surrogate pair, which UTF-8 can't hold, is written as the escape that JSON has for it.

    Raises:
        InputError: the disk is full.
    """
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file that is either the old one or the new one, never half."""
    with _replacing(path) as working, create(working) as file:
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


@contextmanager
def followed_by(manifest: Path) -> Iterator[list[Path]]:
    """Give a list for the files that are finished. If the block fails before the manifest, a warning names them."""
    finished: list[Path] = []
    try:
        yield finished
    except BaseException:
        if finished:
            names = ", ".join(map(str, finished))
            warn(f"{names}: complete, but without {manifest.name}: delete, or write again with --overwrite")
        raise


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


def check_path(path: Path, what: str) -> None:
    """Check that files can be written under a path, without making anything.

    Args:
        path: a folder, which need not exist.
        what: the path as the user knows it: "--output_dir OUT".

    Raises:
        InputError: its name can't be that of a folder, it lies below a file or a link to nothing, or the operating
            system refuses it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # tokenizers and matplotlib take no other paths
        raise InputError(f"path {str(path)!a} is not UTF-8: name another folder") from None
    try:
        existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
        if not existing.is_dir():
            kind = "a link to nothing" if existing.is_symlink() and not existing.exists() else "a file"
            raise InputError(f"{what} can't be made, as {existing} is {kind}: name another folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"{what} can't be written ({error.strerror}): name another folder") from None


def check_readable(folder: Path) -> None:
    """Check that the files of a local folder can be read. Libraries say of one without permission that it is missing.

    Raises:
        InputError: naming the first that can't, and why.
    """
    with input_faults(f"folder {folder}", "change its permissions, or name another"):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        with input_faults(f"{path}", "change its permissions, or name another folder"):
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def check_output(path: Path, sources: list[Path], overwrite: bool) -> None:
    """Raise an InputError if `path` is a folder, one of the `sources`, or a file that may not be replaced."""
    if any(path.resolve() == source.resolve() for source in sources):
        raise InputError(f"output {path} is one of the inputs: name another file with -o")
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file")
    if os.path.lexists(path) and not overwrite:
        raise InputError(f"output {path} exists: pass --overwrite to replace it, or name another file")
