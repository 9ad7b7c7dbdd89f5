"""Ways to spoil a file or a value, by seed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# JSON texts that stand in place of a value. Some are no JSON: that is the point.
VALUES = [
    "null",
    "true",
    "0",
    "-1",
    "5",
    "1.5",
    "1e400",
    "NaN",
    "-Infinity",
    '""',
    '" "',
    "[]",
    "{}",
    "[null]",
    "[[1]]",
    '{"a": 1}',
    '"\\ud800"',
    '"\\u0000"',
    '"x"',
    '["human"]',
    "9" * 5000,
    "-" + "9" * 30,
    "[" * 30000 + "]" * 30000,
    '{"a":' * 20000 + "1" + "}" * 20000,
    '"' + "long " * 20000 + '"',
    '"../../x"',
    '"/dev/zero"',
    '"<s>"',
    "1 2",
    "",
    "[1,]",
    "'x'",
    "undefined",
    '"\t"',
    "²",
    "1_0",
]


def mutated_json(rng: random.Random, value: Any) -> str:
    """JSON text of a value of which one part is removed, doubled or replaced by a wrong one."""
    path = rng.choice(_paths(value))
    mark = "<the part that was chosen>"
    if not path:
        return rng.choice(VALUES)
    changed = json.loads(json.dumps(value))
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[path[-1]]
        return json.dumps(changed)
    parent[path[-1]] = mark
    return json.dumps(changed).replace(json.dumps(mark), rng.choice(VALUES))


def _paths(value: Any, above: tuple = ()) -> list[tuple]:
    found = [above]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items)[:200]:
        found += _paths(part, (*above, key))
    return found


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are cut, flipped, doubled, zeroed, or have others put in between."""
    if not data:
        return b"\x00"
    at = rng.randrange(len(data))
    length = min(rng.choice([1, 1, 4, 8, 64, 4096]), len(data) - at)
    kind = rng.choice(["cut", "flip", "double", "zero", "insert", "remove", "word", "end", "empty", "ones"])
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "double":
        return data[: at + length] + data[at:]
    if kind == "zero":
        return data[:at] + bytes(length) + data[at + length :]
    if kind == "ones":
        return data[:at] + b"\xff" * length + data[at + length :]
    if kind == "insert":
        return data[:at] + rng.choice([b"\xff", b"\xef\xbb\xbf", b"\x00", b"\n", b"{", b"]", b'"', b"\x80"]) + data[at:]
    if kind == "remove":
        return data[:at] + data[at + length :]
    if kind == "word":
        word = rng.choice([2**31 - 1, -1, 2**31, -7, 0, 1, 2**16]).to_bytes(5, "little", signed=True)[:4]
        at -= at % 4
        return data[:at] + word + data[at + 4 :]
    return b"" if kind == "empty" else data + rng.randbytes(length)


def spoil_file(rng: random.Random, path: Path) -> str:
    """Replace a file by something that is not right; returns what was done."""
    kinds: list[Callable[[], Any]] = [lambda: spoil_bytes(rng, path)] * 3
    if path.suffix == ".json" or path.name in ("COMPLETED",):
        kinds += [lambda: spoil_json(rng, path)] * 6
    if path.suffix == ".jsonl":
        kinds += [lambda: spoil_row(rng, path)] * 6
    kinds += [
        lambda: path.unlink(),
        lambda: replace_by_folder(path),
        lambda: replace_by_link(rng, path),
        lambda: replace_by_fifo(path),
    ]
    kind = rng.randrange(len(kinds))
    kinds[kind]()
    return f"{path.name} spoilt in way {kind}"


def spoil_bytes(rng: random.Random, path: Path) -> None:
    """Change a file's bytes."""
    path.write_bytes(mutated_bytes(rng, path.read_bytes()))


def spoil_json(rng: random.Random, path: Path) -> None:
    """Change one value of a JSON file."""
    path.write_text(mutated_json(rng, json.loads(path.read_text())))


def spoil_row(rng: random.Random, path: Path) -> None:
    """Change one value of one row of a JSON Lines file."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutated_json(rng, json.loads(lines[at]))
    path.write_text("\n".join(lines) + "\n")


def replace_by_folder(path: Path) -> None:
    """Put a folder in a file's place."""
    path.unlink()
    path.mkdir()


def replace_by_link(rng: random.Random, path: Path) -> None:
    """Put a link that leads nowhere, or to itself, in a file's place."""
    path.unlink()
    path.symlink_to(rng.choice(["nowhere", path.name]))


def replace_by_fifo(path: Path) -> None:
    """Put a named pipe, at whose other end nobody writes, in a file's place."""
    path.unlink()
    os.mkfifo(path)


def copy_of(source: Path, here: Path, name: str) -> Path:
    """A copy of a file or folder, to be spoilt."""
    target = here / name
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    return target
