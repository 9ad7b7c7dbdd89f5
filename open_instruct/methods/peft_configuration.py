"""A file of --peft_config: a PEFT configuration as JSON, read and checked before anything is built from it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from open_instruct.errors import InputError, input_faults, reason_of
from open_instruct.flags.combinations import json_object
from open_instruct.limits import PATTERN_SECONDS, evaluating_input
from open_instruct.methods.peft_types import OWN_FLAGS, REFUSED, TYPES
from open_instruct.small_files import read_text

if TYPE_CHECKING:
    from peft import PeftConfig

FLAG = "--peft_config"
# Fields that describe an adapter which was trained already, not how one is made.
OF_AN_ADAPTER = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")  # texts: expressions
BY_LAYER = ("rank_pattern", "alpha_pattern", "block_size_pattern", "lambda_pattern", "n_frequency_pattern")


def read_configuration(path: str) -> dict[str, Any]:
    """Return the fields of a configuration, `peft_type` included, without those that describe a trained adapter.

    Raises:
        InputError: it can't be read, or names no type that is trained by a configuration; the file, the field and a
            remedy are named.
    """
    what = f"{FLAG} {path}"
    text = read_text(Path(path), what, "name a file that can be read")
    with input_faults(what, "write a JSON object of peft_type and its fields"):
        fields = json_object(text)
    kind = fields.get("peft_type")
    known = [*TYPES, *OWN_FLAGS, *REFUSED]
    if not isinstance(kind, str) or kind not in known:
        seen = "it has no peft_type" if kind is None else f"peft_type {str(kind)[:40]!r} is not known"
        near = difflib.get_close_matches(str(kind).upper(), known, n=1)
        remedy = f", did you mean {near[0]}?" if near else f": use one of {', '.join(TYPES)}"
        raise InputError(f"{what}: {seen}{remedy}")
    if kind in OWN_FLAGS:
        raise InputError(f"{what}: peft_type {kind} has flags of its own: use {OWN_FLAGS[kind]}")
    if kind in REFUSED:
        raise InputError(f"{what}: peft_type {kind} can't be trained here: {REFUSED[kind]}")
    return {name: value for name, value in fields.items() if name not in OF_AN_ADAPTER}


def check_fields(path: str, fields: Mapping[str, Any]) -> None:
    """Refuse fields that the type does not have, or whose values are of another type than PEFT's. Imports PEFT.

    PEFT itself warns of unknown fields at most, and looks at few values before it computes with them.

    Raises:
        InputError: naming every such field.
    """
    import dataclasses
    import typing

    kind, what = fields["peft_type"], f"{FLAG} {path}"
    types = typing.get_type_hints(configuration_class(path, kind))
    known = [item.name for item in dataclasses.fields(configuration_class(path, kind))]
    known = [name for name in known if name not in OF_AN_ADAPTER]
    problems = []
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"remove it; there are {', '.join(sorted(known))}"
            problems.append(f"{name} is no field of {kind}: {remedy}")
        elif name not in ("peft_type", "task_type") and not fits(value, types[name]):
            problems.append(f"{name} {str(value)[:80]!r} has the wrong type: PEFT wants {in_words(types[name])}")
    for name, (usable, reason) in TYPES[kind].refused.items():
        if fields.get(name, usable) != usable:
            problems.append(f"{name} {str(fields[name])[:40]}: {reason}: remove it")
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}")


def configuration_class(path: str, kind: str) -> type:
    """Return PEFT's class of a type's configuration.

    Raises:
        InputError: the installed PEFT does not have the type.
    """
    import peft

    try:
        configuration: type = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    except (KeyError, ValueError):
        what = f"{FLAG} {path}"
        raise InputError(f"{what}: PEFT {peft.__version__} has no peft_type {kind}: install a newer one") from None
    return configuration


def make_configuration(path: str, fields: Mapping[str, Any], task_type: str) -> PeftConfig:
    """Return PEFT's object of checked fields, for a model that does `task_type`.

    Raises:
        InputError: PEFT refuses a value.
    """
    kind, what = fields["peft_type"], f"{FLAG} {path}"
    if fields.get("task_type") not in (None, task_type):
        raise InputError(f"{what}: task_type {fields['task_type']!r} is not the model's: remove it")
    values = {name: value for name, value in fields.items() if name != "peft_type"}
    with input_faults(what, f"change {fields_in(fields, '')}"):
        try:
            return configuration_class(path, kind)(**{**TYPES[kind].defaults, **values, "task_type": task_type})
        except (InputError, ImportError):
            raise
        except Exception as error:  # PEFT checks its fields with errors of many types
            raise InputError(f"{what} can't be used ({reason_of(error)}): change {fields_in(fields, error)}") from error


def fields_in(fields: Mapping[str, Any], error: Any) -> str:
    """Return the names of the fields that an error of PEFT names, or words for all of them."""
    words = "_".join(re.findall(r"[a-z_0-9]+", str(error).lower()))  # "Target modules" are target_modules
    found = [name for name in fields if f"_{name.lower()}_" in f"_{words}_" and name != "peft_type"]
    return ", ".join(found) if found else "the field that it names, or remove it"


def fits(value: Any, kind: Any) -> bool:
    """Return whether a value of JSON fits an annotation of PEFT's. What JSON can't hold or nobody can check fits."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in members)
    if origin is Literal:
        return value in members
    if kind in (None, NoneType):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    if kind is str or (isinstance(kind, type) and issubclass(kind, str)):
        return isinstance(value, str)
    if origin in (list, set, tuple) or kind in (list, set, tuple):
        items = [member for member in members if member is not Ellipsis]
        return isinstance(value, list) and (not items or all(fits(item, items[0]) for item in value))
    if origin is dict or kind is dict:
        return isinstance(value, dict) and (not members or all(fits(item, members[1]) for item in value.values()))
    return True


def in_words(kind: Any) -> str:
    """Return an annotation in words."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(in_words(member) for member in members))
    if origin is Literal:
        return " or ".join(map(repr, members))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
    words |= {list: "a list", set: "a list", tuple: "a list", dict: "an object"}
    return words.get(origin or kind, str(kind))


def check_expressions(settings: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Refuse regular expressions among a configuration's fields that are none, or on which `re` computes for ever.

    Args:
        settings: the fields.
        names: full names of the base's modules.
        what: the configuration, as the user knows it.

    Raises:
        InputError: naming one.
    """
    patterns = [settings.get(name) for name in PATTERNS]
    for name in BY_LAYER:
        by_layer = settings.get(name)
        patterns += list(by_layer) if isinstance(by_layer, dict) else []
    for pattern in patterns:
        if isinstance(pattern, str):
            with evaluating_input(f"{what}: pattern {pattern[:80]!r}", "repair it", PATTERN_SECONDS):
                compiled = re.compile(pattern)
                for name in names:
                    compiled.fullmatch(name)
