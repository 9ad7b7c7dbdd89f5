"""What a merged checkpoint holds for servers: `merged.json`, and the keys and values of its prefixes.

Each adapter stands for P tokens of the vocabulary. Those of a soft prompt of embeddings are ordinary rows of the
embedding matrix. Those of a prefix are placeholders: a server must put the prefix's keys and values into its cache at
their positions, and never compute them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

MERGED = "merged.json"
FOLDER = "prefixes"  # a folder of their own: engines read every *.safetensors beside the configuration as weights
REMEDY = "merge the adapters again"
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer: keys [P, K, E] after rotation, and values


@dataclass(frozen=True)
class Prefix:
    """A prefix of keys and values in a merged checkpoint.

    Args:
        adapter: its name in requests.
        first_id: id of the first of its placeholders, which follow each other.
        num_tokens: P.
        path: file of its keys and values.
        sha256: of that file.
        num_layers: L.
        num_heads: K, heads of keys and values.
        head_size: E.
    """

    adapter: str
    first_id: int
    num_tokens: int
    path: Path
    sha256: str
    num_layers: int
    num_heads: int
    head_size: int

    @property
    def ids(self) -> list[int]:
        """Its placeholders."""
        return list(range(self.first_id, self.first_id + self.num_tokens))

    def load(self) -> KeysValues:
        """Return keys and values of each layer.

        Raises:
            ValueError: the file is missing, damaged, or not of the size that merged.json says.
        """
        try:
            digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
            tensors = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"prefix {self.adapter}: {self.path} can't be read ({error}): {REMEDY}") from None
        shape = (self.num_tokens, self.num_heads, self.head_size)
        names = [f"layers.{layer}.{part}" for layer in range(self.num_layers) for part in ("keys", "values")]
        if digest != self.sha256 or {name: tuple(tensors[name].shape) for name in tensors} != dict.fromkeys(
            names, shape
        ):
            raise ValueError(f"prefix {self.adapter}: {self.path} is not the file that was written here: {REMEDY}")
        return [(tensors[keys], tensors[values]) for keys, values in zip(names[::2], names[1::2], strict=True)]


def write_prefix(folder: Path, adapter: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Write a prefix into a checkpoint.

    Args:
        folder: the checkpoint.
        adapter: its name.
        pairs: keys and values [1, K, P, E] of each layer, keys after rotation.

    Returns:
        Its entries in merged.json.
    """
    tensors = {
        f"layers.{layer}.{part}": value[0].transpose(0, 1).detach().cpu().contiguous()
        for layer, pair in enumerate(pairs)
        for part, value in zip(("keys", "values"), pair, strict=True)
    }
    path = folder / FOLDER / f"{adapter}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    _, num_heads, head_size = tensors["layers.0.keys"].shape
    return {
        "file": f"{FOLDER}/{path.name}",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "layers": len(pairs),
        "heads": num_heads,
        "head_size": head_size,
    }


def read_prefixes(folder: Path) -> list[Prefix]:
    """Return the prefixes of a merged checkpoint.

    Raises:
        ValueError: it is no merged checkpoint, or its merged.json is damaged.
    """
    tokens = read_tokens(folder)
    try:
        return [
            Prefix(
                adapter=name,
                first_id=int(entry["first"]),
                num_tokens=int(entry["number"]),
                path=folder / str(entry["file"]),
                sha256=str(entry["sha256"]),
                num_layers=int(entry["layers"]),
                num_heads=int(entry["heads"]),
                head_size=int(entry["head_size"]),
            )
            for name, entry in tokens.items()
            if entry.get("kind") == "keys_values"
        ]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MERGED} can't be used ({error!r}): {REMEDY}") from None


def read_tokens(folder: Path) -> dict[str, Any]:
    """Return the entries of merged.json about the tokens of each adapter; empty where adapters changed weights.

    Raises:
        ValueError: it is no merged checkpoint, or its merged.json is damaged.
    """
    tokens = read_merged(folder)["tokens"]
    if not isinstance(tokens, dict):
        raise ValueError(f"{folder / MERGED} can't be used (tokens is no object): {REMEDY}")
    return tokens


def added_ids(folder: Path) -> list[int]:
    """Return the ids that the base did not have: the adapters' tokens, and rows that stand for nothing.

    Raises:
        ValueError: see `read_tokens`.
    """
    content, tokens = read_merged(folder), read_tokens(folder)
    try:
        ids = {entry["first"] + number for entry in tokens.values() for number in range(entry["number"])}
        rows = content.get("vocabulary_rows", 0)
        return sorted(ids.union(range(content.get("rows_of_the_base", rows), rows)))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / MERGED} can't be used ({error!r}): {REMEDY}") from None


def read_merged(folder: Path) -> dict[str, Any]:
    """Return the content of merged.json.

    Raises:
        ValueError: it is no merged checkpoint, or its merged.json is damaged.
    """
    path = folder / MERGED
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no merged checkpoint ({path.name}: {error}): give the folder that merge_peft.py made"
        ) from None
    return content
