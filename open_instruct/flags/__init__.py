"""Every flag of the trainer, once: a typed field that carries all facts about the flag.

Names, types and defaults are open-instruct's unless `docs/flags.md` lists the difference. A hyperparameter whose
default is None is filled by the method's recipe (`open_instruct/methods`). Flags hold only what the user gave;
`training/settings.py` resolves them once. Nothing here imports anything heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from typing import Any

from open_instruct.errors import InputError
from open_instruct.flags.accepted import AcceptedFlags
from open_instruct.flags.data import DataFlags
from open_instruct.flags.declare import problems_of
from open_instruct.flags.distillation import DistillationFlags
from open_instruct.flags.method import MethodFlags
from open_instruct.flags.model import ModelFlags
from open_instruct.flags.optimization import OptimizationFlags
from open_instruct.flags.run import RunFlags

GROUPS: tuple[Any, ...] = (
    ModelFlags,
    DataFlags,
    MethodFlags,
    DistillationFlags,
    OptimizationFlags,
    RunFlags,
    AcceptedFlags,
)


@dataclass(frozen=True)
class Flags(ModelFlags, DataFlags, MethodFlags, DistillationFlags, OptimizationFlags, RunFlags, AcceptedFlags):
    """All flags of `finetune_peft.py`, flat, as they were given. Nothing writes to them."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the chosen methods; more than one are trained together, or exclude each other."""
        chosen = [name for name in METHOD_FLAGS if getattr(self, name)]
        included = {FIELDS[name].metadata["includes"] for name in chosen}
        return tuple(FIELDS[name].metadata["chooses"] for name in chosen if name not in included) or ("full",)

    @property
    def method(self) -> str:
        """Name of the chosen method, a key of `methods.METHODS`, or of the two that are trained together."""
        names = self.methods
        return next((name for name, pair in JOINED.items() if set(pair) == set(names)), names[0])


FIELDS: dict[str, Field[Any]] = {item.name: item for item in fields(Flags)}
ALIASES = {alias: name for name, item in FIELDS.items() for alias in item.metadata["aliases"]}
METHOD_FLAGS = tuple(name for name, item in FIELDS.items() if item.metadata["chooses"])
METHOD_NAMES = ("full", *(FIELDS[name].metadata["chooses"] for name in METHOD_FLAGS))
CHOSEN_BY = {FIELDS[name].metadata["chooses"]: name for name in METHOD_FLAGS}  # method → its flag
JOINED = {  # name of two methods that are trained together → their names
    f"{other}_and_{item.metadata['chooses']}": (other, item.metadata["chooses"])
    for item in FIELDS.values()
    for other in item.metadata["joins"]
}
DATA_SOURCES = ("train_file", "dataset_name", "dataset_mixer", "dataset_mixer_list")


def names_with(fact: str, value: Any = True) -> tuple[str, ...]:
    """Return the names of the flags whose `fact` (an argument of `flag`) equals `value`, in their order."""
    return tuple(name for name, item in FIELDS.items() if item.metadata[fact] == value)


def belongs(name: str, methods: Sequence[str]) -> bool:
    """Return whether a flag has a meaning for one of these methods."""
    own = FIELDS[name].metadata["methods"]
    return not own or bool(set(own) & set(methods))


def default_values(**changes: Any) -> dict[str, Any]:
    """Return the default of every flag, with changes, by name."""
    return asdict(Flags()) | changes


def check_flags(flags: Flags, given: Mapping[str, str]) -> None:
    """Check the flags by themselves, without opening a file.

    Args:
        flags: all flags.
        given: the given flags, with their origin.

    Raises:
        InputError: naming every problem at once.
    """
    problems = []
    chosen = {name for name in METHOD_FLAGS if getattr(flags, name)}
    exclusive = chosen - {FIELDS[name].metadata["includes"] for name in chosen}
    if len(exclusive) > 1 and flags.method not in JOINED:
        named = " and ".join(f"--{name}" for name in METHOD_FLAGS if name in exclusive)
        problems.append(f"{named} exclude each other: choose one method, or LoRA and a soft prompt")
    if not flags.model_name_or_path and not flags.adapter_name_or_path:
        problems.append("--model_name_or_path is missing: give a local folder or a name on the Hub")
    sources = [name for name in DATA_SOURCES if getattr(flags, name)]
    if len(sources) != 1:
        seen = " and ".join(f"--{name}" for name in sources) or "none is set"
        problems.append(
            f"exactly one source of training data is needed ({seen}): use --train_file, --dataset_name or "
            "--dataset_mixer_list"
        )
    known_methods = None if flags.adapter_name_or_path and not chosen else flags.methods
    problems += problems_of(flags, FIELDS.values(), given, known_methods)
    if problems:
        raise InputError("; ".join(problems))
