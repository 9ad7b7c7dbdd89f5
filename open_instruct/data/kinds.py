"""Kinds of data files, recognised by their first bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from open_instruct.errors import InputError, one_line

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
TABLE_SUFFIXES = (".arrow", ".feather", ".parquet")
TABLE_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
LFS_HEADER = b"version https://git-lfs"
HEAD_BYTES = 256  # enough for the white space that may stand before the bracket of a JSON array


def file_kind(path: Path) -> str:
    """Return the kind of a file: "json lines", "json array", "parquet", "arrow file" or "arrow stream".

    Text that does not begin like an array is called "json lines": only reading it shows whether it is. Files that end
    in .gz or .zst are looked into, and can only be JSON.

    Raises:
        InputError: the file is missing, a folder, empty, a Git LFS pointer, or can't be decompressed.
    """
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.json*"))[:5] if path.parent.is_dir() else []
        raise InputError(f"no such file: {path}" + (f" (its folder has {', '.join(near)})" if near else ""))
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head:
            raise InputError(f"{path} is empty: fetch it again, or name another file")
        if head.startswith(LFS_HEADER):
            raise InputError(f"{path} is a Git LFS pointer, not the data: run `git lfs pull` in its repository")
        if path.suffix in COMPRESSION:
            with open_bytes(path) as file:
                head = file.read(HEAD_BYTES)
    except OSError as error:
        raise InputError(
            f"{path} can't be read ({one_line(error, 200)}): fetch it again, or mend its permissions"
        ) from None
    if path.suffix not in COMPRESSION:  # tables compress their columns themselves
        for magic, kind in TABLE_MAGIC.items():
            if head.startswith(magic):
                return kind
    return "json array" if head.lstrip().startswith(b"[") else "json lines"


def is_table(path: Path, kind: str) -> bool:
    """Return whether a file of this kind, or of this name, should be read as Arrow or Parquet."""
    return kind in TABLE_MAGIC.values() or path.suffix in TABLE_SUFFIXES


def is_json(path: Path) -> bool:
    """Return whether a name ends like JSON, compressed or not."""
    name = path.with_suffix("") if path.suffix in COMPRESSION else path
    return name.suffix in (".jsonl", ".json")


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading bytes; .gz and .zst are decompressed on the way."""
    if path.suffix not in COMPRESSION:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=COMPRESSION[path.suffix]))
