"""What a row says of tools: the schemas in its column `tools`, and the messages that call tools or give results.

The column holds what open-instruct reads: a list of JSON schemas (objects), one such object, or JSON text of either.
Null, "" and [] mean that there are none. A table can't tell a null from a missing entry, so nulls in lists and objects
are left out; JSON text keeps its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from open_instruct.data.texts import kind_of, shown
from open_instruct.errors import InputError, input_faults

TOOLS = "tools"  # column of rows, and argument of chat templates
CALLS = ("tool_calls", "function_calls")  # entries of an assistant's message
RESULT_ROLES = ("tool", "ipython", "environment")  # of messages that give what a tool wrote, which may be nothing
REMEDY = "give a list of JSON schemas, or JSON text of one; rename or remove a column that means something else"

Tools = tuple[dict[str, Any], ...]


def tools_in(source: str, row: Mapping[str, Any]) -> Tools:
    """Return the schemas of a row's tools, none where the column is missing or empty.

    Args:
        source: where the row stands, for errors.
        row: the row's columns.

    Raises:
        InputError: the column holds something else, as names of tools.
    """
    value, what = row.get(TOOLS), f"{source}: `{TOOLS}`"
    if isinstance(value, str):
        with input_faults(f"{what} is text that", REMEDY):
            value = json.loads(value) if value.strip() else None
    else:
        value = without_nulls(value)
    if not value or (isinstance(value, float) and math.isnan(value)):
        return ()
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list):
        raise InputError(f"{what} is {kind_of(tools)}: {REMEDY}")
    for tool in tools:
        if isinstance(tool, str):
            raise InputError(f"{what} names a tool, {shown(tool)}, and does not describe it: {REMEDY}")
        if not isinstance(tool, dict) or not tool:
            raise InputError(f"{what} holds {kind_of(tool) if tool else 'an empty value'}: {REMEDY}")
    return tuple(tools)


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls in its lists and objects."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value if item is not None]
    return value


def has_calls(message: Mapping[str, Any]) -> bool:
    """Return whether an assistant's message calls tools."""
    return message.get("role") == "assistant" and any(message.get(name) for name in CALLS)


def without_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without its calls."""
    return {name: value for name, value in message.items() if name not in CALLS}
