"""A study's YAML file → checked, typed values."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from open_instruct.adapters.answer_metrics import NORMALISERS
from open_instruct.arguments import METHOD_FLAGS
from open_instruct.errors import InputError

KINDS = ("grid", "random", "halving")
METHOD_NAMES = ("full", *(name.removeprefix("use_") for name in METHOD_FLAGS))

# What would make a comparison unfair if one method had it and another had not: data, tokens, precision.
SAME_FOR_ALL = {
    "model_name_or_path", "model_revision", "dtype", "train_file", "dataset_name", "dataset_config_name", "dataset_mixer",
    "dataset_mixer_list", "validation_file", "validation_fraction", "max_eval_samples", "max_train_samples", "max_seq_length",
    "chat_template_name", "add_bos", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_train_steps", "reduce_loss", "split_seed",
}  # fmt: skip
OURS = (
    "seed",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "adapter_name_or_path",
    "dry_run",
    "keep_best",
    *METHOD_FLAGS,
)


@dataclass(frozen=True)
class Axis:
    """One searched flag: listed values, or a range that is drawn from on a log scale."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Entry:
    """One competitor: a method with flags of its own and the space of those that are searched."""

    name: str
    method: str
    flags: dict[str, Any]
    space: tuple[Axis, ...]


@dataclass(frozen=True)
class Study:
    """Everything that a study's file says."""

    name: str
    path: Path
    output_dir: Path
    flags: dict[str, Any]
    entries: tuple[Entry, ...]
    kind: str
    points: int  # of each entry; random and halving
    eta: int  # halving: one point in eta goes on, with eta times the steps
    search_seed: int
    seeds: tuple[int, ...]
    questions: int = 50  # answered by each trial
    max_new_tokens: int = 128
    answer_regex: str | None = None
    normalise: str = "none"
    other_text: Path | None = None  # on which forgetting is measured
    keep_full_weights: bool = False


def read(path: Path) -> Study:
    """Read and check a study.

    Raises:
        InputError: naming every problem at once.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"study {path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"study {path} holds a {type(content).__name__}: it must map names to values")
    problems: list[str] = []
    known = {"name", "output_dir", "flags", "methods", "search", "seeds", "report", "keep_full_weights"}
    unknown_keys(content, known, "", problems)
    flags = mapping(content, "flags", problems)
    search = mapping(content, "search", problems)
    report = mapping(content, "report", problems)
    unknown_keys(search, {"kind", "points", "eta", "seed", "space"}, "search.", problems)
    unknown_keys(
        report, {"questions", "max_new_tokens", "answer_regex", "normalise", "other_text"}, "report.", problems
    )
    for name in OURS:
        if name in flags:
            problems.append(f"flags.{name} is decided by the study: remove it")
    kind = one_of(search.get("kind", "grid"), KINDS, "search.kind", problems)
    shared = axes(mapping(search, "space", problems, "search."), "search.space", kind, problems)
    entries = tuple(
        entry(name, given, shared, kind, problems) for name, given in mapping(content, "methods", problems).items()
    )
    if not entries:
        problems.append(f"methods is empty: name at least one of {', '.join(METHOD_NAMES)}")
    name = str(content.get("name", path.stem))
    study = Study(
        name=name,
        path=path,
        output_dir=Path(str(content.get("output_dir", f"output/studies/{name}"))),
        flags=flags,
        entries=entries,
        kind=kind,
        points=whole(search, "points", 20, 1, "search.", problems),
        eta=whole(search, "eta", 3, 2, "search.", problems),
        search_seed=whole(search, "seed", 0, 0, "search.", problems),
        seeds=seeds_of(content.get("seeds", [1, 2, 3]), problems),
        questions=whole(report, "questions", 50, 0, "report.", problems),
        max_new_tokens=whole(report, "max_new_tokens", 128, 1, "report.", problems),
        answer_regex=report.get("answer_regex"),
        normalise=one_of(report.get("normalise", "none"), NORMALISERS, "report.normalise", problems),
        other_text=Path(str(report["other_text"])) if report.get("other_text") else None,
        keep_full_weights=bool(content.get("keep_full_weights", False)),
    )
    check(study, problems)
    if problems:
        raise InputError(f"study {path}: " + "; ".join(problems))
    return study


def check(study: Study, problems: list[str]) -> None:
    """What the parts of a study need of each other."""
    if study.kind == "grid":
        counts = {entry.name: math.prod(len(axis.values) for axis in entry.space) for entry in study.entries}
        if len(set(counts.values())) > 1:
            seen = ", ".join(f"{name} {count}" for name, count in counts.items())
            problems.append(
                f"methods have unequal tuning budgets ({seen} points): give each as many, or use search.kind random"
            )
    else:
        bare = [entry.name for entry in study.entries if not entry.space]
        if bare:
            problems.append(f"{', '.join(bare)}: nothing to search: give search.space, or use search.kind grid")
    if study.kind == "halving" and not study.flags.get("max_train_steps"):
        problems.append("search.kind halving shortens runs: set flags.max_train_steps")
    if study.other_text and not study.other_text.is_file():
        problems.append(f"report.other_text {study.other_text}: no such file")


def entry(name: str, given: Any, shared: tuple[Axis, ...], kind: str, problems: list[str]) -> Entry:
    """One of `methods`: flags, and the reserved keys `method` and `space`."""
    given = given or {}
    if not isinstance(given, dict):
        problems.append(f"methods.{name} is {given!r}: it must map flags to values")
        given = {}
    method = one_of(
        given.get("method", name), METHOD_NAMES, f"methods.{name}" + (".method" if "method" in given else ""), problems
    )
    own = mapping(given, "space", problems, f"methods.{name}.")
    flags = {key: value for key, value in given.items() if key not in ("method", "space")}
    for key in (*SAME_FOR_ALL, *OURS):
        if key in flags or key in own:
            problems.append(f"methods.{name}.{key} must be the same for all methods: set it under flags")
    kept = {axis.name: axis for axis in shared if axis.name not in flags}
    kept |= {axis.name: axis for axis in axes(own, f"methods.{name}.space", kind, problems)}
    return Entry(str(name), method, flags, tuple(kept.values()))


def axes(given: dict[str, Any], place: str, kind: str, problems: list[str]) -> tuple[Axis, ...]:
    """`flag: [values]` or `flag: {low: …, high: …}`."""
    found = []
    for name, value in given.items():
        if name in SAME_FOR_ALL or name in OURS:
            problems.append(f"{place}.{name} must be the same for all trials: set it under flags, or seeds")
        elif isinstance(value, list) and value:
            found.append(Axis(name, tuple(value)))
        elif not isinstance(value, dict) or set(value) != {"low", "high"}:
            problems.append(f"{place}.{name} is {value!r}: give a list of values, or {{low: …, high: …}}")
        elif kind == "grid":
            problems.append(
                f"{place}.{name} is a range: a grid needs a list of values; ranges are for random and halving"
            )
        elif (
            not all(isinstance(number, int | float) and number > 0 for number in value.values())
            or not value["low"] < value["high"]
        ):
            problems.append(
                f"{place}.{name} {value}: both bounds must be positive numbers (1.0e-3, not 1e-3), low below high"
            )
        else:
            found.append(Axis(name, low=value["low"], high=value["high"]))
    return tuple(found)


def mapping(content: dict[str, Any], name: str, problems: list[str], place: str = "") -> dict[str, Any]:
    """A sub-mapping, empty where it is missing."""
    value = content.get(name) or {}
    if isinstance(value, dict):
        return value
    if name == "methods" and isinstance(value, list):
        return dict.fromkeys(map(str, value))
    problems.append(f"{place}{name} is {value!r}: it must map names to values")
    return {}


def unknown_keys(content: dict[str, Any], known: set[str], place: str, problems: list[str]) -> None:
    """A key that nothing reads would be ignored silently."""
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            problems.append(
                f"unknown {place}{name}"
                + (f", did you mean {near[0]}?" if near else f": known are {', '.join(sorted(known))}")
            )


def one_of(value: Any, choices: tuple[str, ...], place: str, problems: list[str]) -> str:
    """A value among the choices."""
    if value not in choices:
        problems.append(f"{place} {value!r} is not known: choose {', '.join(choices)}")
        return choices[0]
    return str(value)


def whole(content: dict[str, Any], name: str, default: int, least: int, place: str, problems: list[str]) -> int:
    """A whole number of at least so much."""
    value = content.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        problems.append(f"{place}{name} {value!r} is not a whole number of at least {least}")
        return default
    return value


def seeds_of(value: Any, problems: list[str]) -> tuple[int, ...]:
    """Different whole numbers."""
    good = isinstance(value, list) and value and all(isinstance(seed, int) and seed >= 0 for seed in value)
    if not good or len(set(value)) < len(value):
        problems.append(f"seeds {value!r}: give a list of different whole numbers")
        return (1,)
    return tuple(value)
