"""What the tables of evaluations share. Nothing here imports matplotlib."""

from __future__ import annotations

from typing import Any

WRITING = {
    "words": "references in words of another script than Latin",
    "chinese": "in Chinese characters",
    "characters": "in another script without blanks, by character",
}


def cell(figure: dict[str, Any], sign: bool = False) -> str:
    """Return a value with its interval, if that is known."""
    if figure["interval"] is None:
        return f"{figure['value']:.4g}"
    low, high = figure["interval"]
    plus = "+" if sign else ""
    return f"{figure['value']:{plus}.4g} [{low:{plus}.4g}, {high:{plus}.4g}]"
