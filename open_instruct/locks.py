"""Locks that end with their process: on what a run or a tool is about to write, and on temporary files."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from open_instruct.errors import InputError

LOCK = ".open_instruct.lock"  # in the folder that one process at a time may write
MARK = "open-instruct process"  # begins a lock file, so that another program's file of that name is recognised


class Occupied(InputError):
    """Another process, or another program's files, are where something is to be written. The input may be right."""


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder for this process, or return False if another one holds it.

    The operating system unlocks it when the descriptor is closed, even if the process is killed. On a file system
    without locks (some clusters' ones), whose refusal is an OSError, nothing is locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path still names the open file or folder."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


@contextmanager
def locked(path: Path, purpose: str) -> Iterator[None]:
    """Hold a lock file during the block. A lock whose process has died, however it died, is taken over.

    Afterwards the file is removed, and with it the folders that were made for it, where they are still empty.

    Args:
        path: the lock file.
        purpose: what is protected, as the user knows it: "--output_dir OUT".

    Raises:
        Occupied: another process holds it, or another program's file has its name.
        InputError: the operating system refuses it.
    """
    missing: list[Path] = []
    descriptor = None
    try:
        try:
            missing = [folder for folder in path.absolute().parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _take(path, purpose)
        except OSError as error:
            raise InputError(f"{purpose} can't be written ({error.strerror}): name another") from None
        yield
    finally:
        if descriptor is not None:
            if is_at(descriptor, path):
                path.unlink()  # while it is locked: whoever has opened it sees that it is gone, and opens it anew
            os.close(descriptor)
        with suppress(OSError):  # not empty, or not made
            for folder in missing:
                folder.rmdir()


def _take(path: Path, purpose: str) -> int:
    """Return a descriptor that holds a lock file."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            content = os.read(descriptor, 1000).decode(errors="replace").strip()
            if content and not content.startswith(MARK):
                raise Occupied(f"{purpose} needs the file {path}, which another program wrote: move it away")
            with suppress(OSError):
                if not try_lock(descriptor):
                    owner = content.removeprefix("open-instruct ") or "another process"
                    raise Occupied(f"{purpose} is in use by {owner}: wait for its end, or name another")
            if is_at(descriptor, path):  # else its former owner has just removed it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{MARK} {os.getpid()} on {platform.node()}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
