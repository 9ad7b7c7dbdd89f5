"""Files and folders under temporary names: exclusive, locked, removed with their process or at the next start."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from open_instruct.errors import InputError
from open_instruct.locks import is_at, try_lock

NAME = re.compile(r"\..*\.\d+-[0-9a-f]{8}\.writing", re.DOTALL)
LONGEST_NAME = 200  # bytes of a file's name that its temporary name repeats; file systems allow 255 in all

# What is being written: the descriptor that holds its lock, and the process, as a forked one must leave it alone. An
# interrupt can arrive where no `finally` is entered yet, so that nothing else would remove it.
_unfinished: dict[Path, tuple[int, int]] = {}


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path`. It is random, as in a container every process may have the same id."""
    stem = os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])
    return path.with_name(f".{stem}.{os.getpid()}-{secrets.token_hex(4)}.writing")


def create(path: Path) -> BinaryIO:
    """Open a new file for writing under a temporary name, with the umask's permissions; it stays locked until `forget`.

    Raises:
        InputError: the name is taken. A symbolic link counts too, so none that was planted there is ever followed.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        except FileExistsError:
            raise InputError(
                f"temporary file {path} existed before it was made, so nothing was written: try again"
            ) from None
        if _hold(path, os.dup(descriptor)):
            return os.fdopen(descriptor, "wb")
        os.close(descriptor)


def _hold(path: Path, descriptor: int) -> bool:
    """Lock and remember what was just made. Return False if another process took it for a dead one's and removed it."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if not is_at(descriptor, path):
        os.close(descriptor)
        return False
    _unfinished[path] = descriptor, os.getpid()
    return True


def forget(path: Path) -> None:
    """Unlock a temporary file or folder, and remove it if it still has that name."""
    descriptor, process = _unfinished.pop(path, (None, None))
    if descriptor is None or process != os.getpid():
        return
    with suppress(OSError):
        if is_at(descriptor, path):
            _remove(path)
    os.close(descriptor)


@atexit.register
def forget_all() -> None:
    """Remove every temporary file and folder of this process."""
    for path in list(_unfinished):
        forget(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def remove_dead(folder: Path) -> None:
    """Remove temporary files and folders whose processes have died. Where locks don't work, nothing is removed."""
    with suppress(OSError):  # some of it may belong to another user
        for name in os.listdir(folder):
            if NAME.fullmatch(name):
                _remove_if_dead(folder / name)


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):
        kind = path.lstat().st_mode
        if path in _unfinished or not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return
        access = os.O_RDONLY if stat.S_ISDIR(kind) else os.O_RDWR  # NFS locks only what can be written
        descriptor = os.open(path, access | os.O_NOFOLLOW)
        try:
            if try_lock(descriptor):
                _remove(path)
        finally:
            os.close(descriptor)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder under a temporary name beside `path`. What is not renamed in the block is removed after it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(path.parent)
    while True:
        working = temporary_name(path)
        working.mkdir()
        if _hold(working, os.open(working, os.O_RDONLY)):
            break
    try:
        yield working
    finally:
        forget(working)


def share(folder: Path) -> None:
    """Give the files of a folder the permissions that the umask allows: safetensors keeps them from everyone else."""
    probe = folder / f".{secrets.token_hex(8)}"
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
