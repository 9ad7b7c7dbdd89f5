"""What checkpoints hold, checked before it is used: whatever is in the files, it is a run's state or one clear reason.

Checksums catch damage. This module catches what has right checksums and is no state of this run all the same: files of
other versions, other tools or other runs, and edits by hand.
"""

from __future__ import annotations

import math
import pickle
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from open_instruct.model.weights import not_finite, some_of
from open_instruct.training.state import History, TrainState

MAX_COUNT = 2**62
FINDING = {"step": int, "name": str, "seen": str, "cause": str, "remedy": str}


def typed(value: Any, expected: Any, name: str) -> Any:
    """Return a value of JSON as the type that a dataclass declares.

    Args:
        value: the value.
        expected: int, float, str, a dataclass, or list, tuple, dict, Mapping and unions of such.
        name: what it is called in messages.

    Raises:
        ValueError: it is something else.
    """
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return value
    if origin in (Union, types.UnionType):
        known = [item for item in inner if item is not type(None)]
        return None if value is None and len(known) < len(inner) else typed(value, known[0], name)
    if origin is list and isinstance(value, list):
        return [typed(item, inner[0], name) for item in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(typed(item, kind, name) for item, kind in zip(value, inner, strict=True))
    if origin in (dict, Mapping) and isinstance(value, dict):
        return value
    if is_dataclass(expected) and isinstance(value, dict):
        return from_values(expected, value, name)
    if expected is int and isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT:
        return value
    if expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if expected is str and isinstance(value, str):
        return value
    raise ValueError(f"{name} is {str(value)[:60]!r}, which is no {getattr(expected, '__name__', expected)}")


def from_values(kind: Any, values: Mapping[str, Any], what: str) -> Any:
    """Return a dataclass from the values of its fields, each checked. Missing ones keep their default.

    Raises:
        ValueError: a value has another type, or a field is unknown.
    """
    hints = get_type_hints(kind)
    names = [item.name for item in fields(kind) if item.init]
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        raise ValueError(f"{what} has an unknown entry {unknown[:60]!r}")
    return kind(**{name: typed(value, hints[name], name) for name, value in values.items()})


def train_state(values: Any) -> TrainState:
    """Return the state of a run from what state.json says of its progress.

    Raises:
        ValueError: it is no state that a run can have.
    """
    if not isinstance(values, dict):
        raise ValueError(f"its progress is {type(values).__name__}, not an object")
    history = {} if "history" in values else {"history": history_of_old(values)}
    state: TrainState = from_values(TrainState, {**values, **history}, "its progress")
    measured = state.history
    finite = [state.train_seconds, state.wall_seconds, *measured.losses, *measured.norms]
    problems = {
        "step is 0": state.step == 0,
        "a time or a training loss is not finite": not all(math.isfinite(number) for number in finite),
        "it holds more losses than steps": max(len(measured.losses), len(measured.norms)) > state.step,
        "it has losses without gradient norms": len(measured.losses) != len(measured.norms),
        "it was evaluated after its last step": any(step > state.step for step, _ in measured.evaluations),
        "a loss of a source is malformed": not are_source_losses(measured),
        "its best step lies ahead": (state.best_step or 0) > state.step,
        "its best loss is not finite": not math.isfinite(state.best_eval_loss or 0.0),
        "a best step has no loss": (state.best_step is None) != (state.best_eval_loss is None),
        "a finding is malformed": not all(is_finding(finding) for finding in state.findings),
        "it holds parameters": bool(state.best),
    }
    problem = next((text for text, is_so in problems.items() if is_so), None)
    if problem:
        raise ValueError(problem)
    return state


def is_finding(value: Any) -> bool:
    """Return whether a value is what the loss doctor reports."""
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in FINDING.items())


def are_source_losses(history: History) -> bool:
    """Return whether the losses of sources are numbers, each of an evaluation."""
    evaluated = {0, *(step for step, _ in history.evaluations)}
    by_name = [history.base_by_source, *(losses for _, losses in history.by_source)]
    return all(step in evaluated for step, _ in history.by_source) and all(
        type(loss) is float for losses in by_name for loss in losses.values()
    )


def history_of_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the counters of a checkpoint without a history say of it: versions before 0.1 wrote none."""
    losses = {"base": values.get("base_eval_loss"), "initial": values.get("initial_eval_loss")}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return {**known, "reported": [finding["name"] for finding in values.get("findings", [])]}


def check_parameters(values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuse parameters that are not those of the run, or not finite.

    Args:
        values: tensors of a file.
        shapes: shapes of the run's trained parameters.
        name: name of the file.

    Raises:
        ValueError: naming one of them.
    """
    other = {key: tuple(tensor.shape) for key, tensor in values.items()}
    if other != dict(shapes):
        key = next(key for key in {**shapes, **other} if other.get(key) != shapes.get(key))
        raise ValueError(
            f"{name} holds other parameters than those that this run trains ({key}: {other.get(key, 'missing')} "
            f"instead of {shapes.get(key, 'none')}): give the same method and sizes"
        )
    broken = not_finite(values.items())
    if broken:
        raise ValueError(f"{name} holds numbers in {some_of(broken)} that are not finite")


def load_optimizer(path: Path) -> Any:
    """Return what an optimizer's file holds; no code in it is run.

    Raises:
        ValueError: it holds something else than tensors and plain values.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a pickle's protocol before it refuses the pickle
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError:  # whose text advises to load the file all the same
            raise ValueError(f"{path.name} is no file of tensors") from None


def check_moments(
    state: Any, shapes: Sequence[tuple[int, ...]], first_state: Callable[[tuple[int, ...]], Any]
) -> dict[int, Any]:
    """Return the moments of an optimizer's state, each compared with what such an optimizer keeps of such a parameter.

    Args:
        state: content of the optimizer's file.
        shapes: full shapes of the optimizer's parameters, in their order.
        first_state: what the run's optimizer keeps of a parameter of some shape after its first step.

    Raises:
        ValueError: they belong to another optimizer or to other parameters, or are not finite.
    """
    moments = state.get("state") if isinstance(state, dict) else None
    if not isinstance(moments, dict) or not all(type(key) is int and 0 <= key < len(shapes) for key in moments):
        raise ValueError("it does not hold the moments of this run's parameters")
    expected: dict[tuple[int, ...], Any] = {}
    for number, values in moments.items():
        shape = shapes[number]
        if shape not in expected:
            expected[shape] = layout(first_state(shape))
        if layout(values) != expected[shape]:
            raise ValueError(f"its moments of parameter {number} are those of another optimizer, or of another shape")
        if not_finite(("", tensor) for tensor in tensors_of(values)):
            raise ValueError(f"its moments of parameter {number} are not finite")
    return moments


def layout(value: Any) -> Any:
    """Return names, shapes and types of nested tensors, without their numbers."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {name: layout(item) for name, item in value.items()}
    return type(value)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a nested dictionary."""
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    return [value] if isinstance(value, torch.Tensor) else []
