"""Weights as they were read: whether they are all there, have a place in the model, and are numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from open_instruct.errors import InputError, input_faults
from open_instruct.small_files import must_be_file

COMPARABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of which torch finds the extremes


def some_of(names: Iterable[str], most: int = 3) -> str:
    """Return the first names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most:,} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def misfit(
    missing: Iterable[str],
    unexpected: Iterable[str],
    mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
) -> str | None:
    """Say in which way weights do not fit a model; None if they do.

    Args:
        missing: parameters of the model that the file lacks.
        unexpected: names in the file that the model has no place for.
        mismatched: name, shape in the file, shape in the model.
    """
    lacking, foreign = set(missing), set(unexpected)
    other = {f"{name} {list(stored)}, the model needs {list(needed)}" for name, stored, needed in mismatched}
    groups = {"missing": lacking, "without a place in the model": foreign, "of another shape": other}
    parts = [f"{len(names):,} {words}: {some_of(names)}" for words, names in groups.items() if names]
    return "; ".join(parts) or None


def plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor consists of: itself, or those of a quantised tensor (codes and scales)."""
    values = tensor.detach()
    if type(values) in (torch.Tensor, torch.nn.Parameter) or not hasattr(values, "__tensor_flatten__"):
        yield values
        return
    for name in values.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(values, name))


def not_finite(tensors: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the names of the tensors that hold a value that is not finite.

    One pass without a copy: some 4 billion bfloat16 numbers a second on one core, so 2 s for 7 billion. Tensors of
    integers, of 8 bits, and without values (meta, sharded away) are passed over; of a quantised one, see `scales_of`.
    """
    found = []
    for name, tensor in tensors:
        for values in plain_tensors(tensor):
            if values.dtype not in COMPARABLE or values.device.type == "meta" or not values.numel():
                continue
            low, high = values.aminmax()  # both are nan where there is one
            if not (torch.isfinite(low) and torch.isfinite(high)):
                found.append(name)
                break
    return found


def scales_of(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the scales of bitsandbytes' quantised weights, in which a number that was not finite shows."""
    for name, parameter in model.named_parameters():
        state: Any = getattr(parameter, "quant_state", None)
        nested: Any = getattr(state, "state2", None)  # of double quantisation
        scales = [getattr(parameter, "SCB", None), getattr(state, "offset", None), getattr(nested, "absmax", None)]
        for tensor in [*scales, getattr(state, "absmax", None)]:
            if isinstance(tensor, torch.Tensor):
                yield name, tensor


def read_tensors(path: Path, what: str, remedy: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file of finite numbers.

    Args:
        path: the file.
        what: the thing that it holds, as the user knows it.
        remedy: what the user can do where it can't be used.

    Raises:
        InputError: it is missing, damaged or no safetensors, or holds what is not finite.
    """
    with input_faults(f"{what} ({path})", remedy):
        must_be_file(path)
        path.open("rb").close()  # safetensors says of a file that may not be read that there is none
        tensors = load_file(path)
    check_finite(tensors.items(), f"{what} ({path})", remedy)
    return tensors


def check_finite(tensors: Iterable[tuple[str, Any]], what: str, remedy: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        InputError: naming three of them.
    """
    names = not_finite(tensors)
    if names:
        raise InputError(f"{what} can't be used (not finite, NaN or infinite: {some_of(names)}): {remedy}")


def missing_parts(model: Any, missing: Sequence[str]) -> list[str]:
    """Return the names of parameters that got no value, without those that share one under another name (VB-LoRA's)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in set(missing)}
    return [name for name in missing if id(parameters.get(name)) not in loaded]


def check_tensor_names(tensors: Mapping[str, Any], expected: Iterable[str], what: str, remedy: str) -> None:
    """Refuse a file that does not hold exactly the expected names.

    Raises:
        InputError: naming three of those that are missing or have no place.
    """
    names = set(expected)
    problem = misfit(names - set(tensors), set(tensors) - names)
    if problem:
        raise InputError(f"{what} does not fit ({problem}): {remedy}")
