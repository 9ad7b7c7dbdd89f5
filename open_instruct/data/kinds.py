"""Kinds of data files, recognised by their first bytes."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from open_instruct.errors import InputError, input_faults

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
COMPRESSED_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
TABLE_SUFFIXES = (".arrow", ".feather", ".parquet")
TABLE_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
LFS_HEADER = b"version https://git-lfs"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8, as Windows writes it; it means nothing and is left out
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16, and of UTF-32
BUFFER_BYTES = 1 << 20
HEAD_BYTES = 256  # enough for the white space that may stand before the bracket of a JSON array


def file_kind(path: Path) -> str:
    """Return the kind of a file: "json lines", "json array", "parquet", "arrow file" or "arrow stream".

    Text that does not begin like an array is called "json lines": only reading it shows whether it is. Files that end
    in .gz or .zst are looked into, and can only be JSON.

    Raises:
        InputError: the file is missing, no regular file, empty, a Git LFS pointer, in UTF-16, or not compressed as its
            name says.
    """
    with input_faults(str(path), "fetch it again, mend its permissions, or name another file"):
        check_data_file(path)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head:
            raise InputError(f"{path} is empty: fetch it again, or name another file")
        if head.startswith(LFS_HEADER):
            raise InputError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
        suffix = next((suffix for magic, suffix in COMPRESSED_MAGIC.items() if head.startswith(magic)), None)
        if path.suffix in COMPRESSION and suffix != path.suffix:
            raise InputError(f"{path} is not compressed as its name says: rename it, or fetch it again")
        if suffix and suffix != path.suffix:
            raise InputError(f"{path} is compressed: give it a name that ends in {suffix}")
        if path.suffix in COMPRESSION:
            with open_bytes(path) as file:
                head = file.read(HEAD_BYTES)
    if path.suffix not in COMPRESSION:  # tables compress their columns themselves
        for magic, kind in TABLE_MAGIC.items():
            if head.startswith(magic):
                return kind
    if head.startswith(WIDE_MARKS) or b"\0" in head[:4]:
        raise InputError(f"{path} is no UTF-8 text (UTF-16, or binary data): convert it to UTF-8, or name another file")
    return "json array" if head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[") else "json lines"


def check_data_file(path: Path) -> None:
    """Refuse what is missing, and what is no regular file: a pipe never ends, and can't be read twice.

    Raises:
        InputError: nothing is there, or a folder, pipe, socket or device.
    """
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.json*"))[:5] if path.parent.is_dir() else []
        raise InputError(f"no such file: {path}" + (f" (its folder has {', '.join(near)})" if near else ""))
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"{path} is a pipe, socket or device: write the data to a file, and name that")


def is_table(path: Path, kind: str) -> bool:
    """Return whether a file of this kind, or of this name, should be read as Arrow or Parquet."""
    return kind in TABLE_MAGIC.values() or path.suffix in TABLE_SUFFIXES


def is_json(path: Path) -> bool:
    """Return whether a name ends like JSON, compressed or not."""
    name = path.with_suffix("") if path.suffix in COMPRESSION else path
    return name.suffix in (".jsonl", ".json")


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading bytes; .gz and .zst are decompressed on the way.

    A file that grows while it is read ends where it ended when it was opened.
    """
    file = AsOpened(path)
    if path.suffix not in COMPRESSION:
        return io.BufferedReader(file, BUFFER_BYTES)
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), COMPRESSION[path.suffix]), BUFFER_BYTES)


class AsOpened(io.RawIOBase):
    """A file's bytes up to the size that it had when it was opened."""

    def __init__(self, path: Path) -> None:
        """Open the file and note its size."""
        self.file = path.open("rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes as there are, up to the buffer's size."""
        left = self.size - self.file.tell()
        return self.file.readinto(memoryview(buffer)[:left]) or 0 if left > 0 else 0

    def tell(self) -> int:
        """Return the position."""
        return self.file.tell()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()
