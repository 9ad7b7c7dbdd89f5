"""The base that an adapter was trained on: whether two names mean the same one, and what else makes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class BaseChanges:
    """What makes a base out of a named model: the values of three flags of the run; None: not given."""

    model_revision: str | None = None
    config_name: str | None = None
    additional_model_arguments: str | None = None

    def text(self) -> str:
        """Return the flags as words of a command line."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return " ".join(f"--{name} {value}" for name, value in given.items()) or "without further flags"

    def same(self, other: BaseChanges) -> bool:
        """Whether two of them make the same base: JSON objects are compared by content."""
        return self.comparable() == other.comparable()

    def comparable(self) -> tuple[Any, ...]:
        """Return values that are equal where two bases are."""
        from open_instruct.model.configuration import canonical  # imports torch

        revision = None if self.model_revision == "main" else self.model_revision
        return revision, self.config_name, canonical(self.additional_model_arguments)


def same_base(first: str, second: str) -> bool:
    """Return whether two names mean the same base.

    They do if they are the same folder, if two folders have equal content, or, where one has moved, if their last parts
    are equal.
    """
    folders = Path(first), Path(second)
    if first == second:
        return True
    if all(folder.is_dir() for folder in folders):
        if folders[0].resolve() == folders[1].resolve():
            return True
        from open_instruct.model import loading  # imports torch, and only two copies of a model come this far

        keys = [loading.weights_key(name, loading.load_config(name)) for name in (first, second)]
        return keys[0] == keys[1]
    return folders[0].name.lower() == folders[1].name.lower()
