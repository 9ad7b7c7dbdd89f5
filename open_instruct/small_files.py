"""Files that a user writes by hand, or that lie beside a model: read with limits on size, depth and time.

A YAML file is data here: mappings, lists, texts, numbers, truth values and null. What YAML could do beyond that (other
tags, dates, several documents, aliases that contain themselves or multiply) is refused with its line.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from open_instruct.errors import InputError, input_faults
from open_instruct.limits import limited_time

MAX_BYTES = 1 << 20  # of a file that a user writes
MAX_DEPTH = 50  # of mappings and lists within each other
MAX_VALUES = 100_000  # with every alias replaced by what it stands for
MAX_DIGITS = 400  # of a number: the largest float has 309 before its point
TAGS = ("str", "int", "float", "bool", "null", "seq", "map", "merge")


def read_text(path: Path, what: str, remedy: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a small file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        what: the file as the user knows it.
        remedy: what the user can do if it can't be read.
        max_bytes: largest size.

    Raises:
        InputError: it can't be read, is a folder, a pipe or a device, too large, or not UTF-8.
    """
    with input_faults(what, remedy):
        must_be_file(path)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"it has more than {max_bytes:,} bytes")
        return data.decode("utf-8-sig")


def must_be_file(path: Path) -> None:
    """Refuse what is there and is no file: reading a pipe would wait for ever, and a device has no end.

    Raises:
        OSError: nothing is there.
        ValueError: it is a folder, a pipe or a device.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe or a device, not a file")


def read_json(path: Path, what: str, remedy: str, max_bytes: int = MAX_BYTES) -> Any:
    """Return the content of a small JSON file; see `read_text`."""
    text = read_text(path, what, remedy, max_bytes)
    with input_faults(what, remedy):
        return json.loads(text)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping that a YAML (or JSON) file holds. All keys in it are texts.

    Args:
        path: the file.
        what: the file as the user knows it.

    Raises:
        InputError: it can't be read, or is no such mapping; the line is named.
    """
    remedy = "mend it, or name another file"
    text = read_text(path, what, remedy)
    with limited_time(what, remedy), input_faults(what, remedy):
        try:
            content = yaml.load(text, PlainLoader)
        except yaml.MarkedYAMLError as error:
            line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
            raise ValueError(f"{line}{error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    if not isinstance(content, dict):
        raise InputError(f"{what} holds a {type(content).__name__}: it must map names to values")
    return content


class PlainLoader(yaml.SafeLoader):
    """Loads plain data, and refuses everything else with its line."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute; a date stays the text that it is
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        """Start at the text's beginning."""
        super().__init__(stream)
        self.depth = 0
        self.sizes: dict[int, int] = {}  # values below each finished node, by the node's id

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Return the next node, and count its depth and size, so that nothing multiplies before it is built."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, "it is nested too deeply", self.peek_event().start_mark)
        mark = self.peek_event().start_mark
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is None:
            return None
        if node.tag.removeprefix("tag:yaml.org,2002:") not in TAGS:
            raise yaml.MarkedYAMLError(None, None, f"the tag {node.tag} has no meaning here", mark)
        if id(node) not in self.sizes:
            if node.end_mark is None:  # an alias within the collection that it stands for
                raise yaml.MarkedYAMLError(None, None, "an alias stands for what contains it", mark)
            parts = [] if isinstance(node, ScalarNode) else node.value
            flat = [part for pair in parts for part in pair] if isinstance(node, MappingNode) else parts
            self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in flat)
        if self.sizes[id(node)] > MAX_VALUES:
            raise yaml.MarkedYAMLError(None, None, f"its aliases make more than {MAX_VALUES:,} values", mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping whose keys are different texts."""
        seen = set()
        for key, _ in node.value if isinstance(node, MappingNode) else []:
            if key.tag.endswith(":merge"):
                continue
            problem = None
            if not isinstance(key, ScalarNode) or not key.tag.endswith(":str"):
                shown = f"the key {key.value}" if isinstance(key, ScalarNode) else "a key"
                problem = f"{shown} is no text: put it in quotes"
            elif key.value in seen:
                problem = f"the key {key.value} stands there twice"
            if problem:
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        """Return a scalar's text; one that stands for a number is short."""
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            problem = f"a number has {len(node.value):,} digits, and {MAX_DIGITS} are allowed"
            raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
        return super().construct_scalar(node)
