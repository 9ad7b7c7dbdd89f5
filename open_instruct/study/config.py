"""A study's YAML file → checked, typed values. Imports nothing heavy: a mistake in the file is answered at once."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_instruct.adapters.answer_metrics import METRICS, NORMALISERS, check_regex
from open_instruct.adapters.named_files import named_files
from open_instruct.command_line import flags_in
from open_instruct.errors import InputError, visible
from open_instruct.flags import CHOSEN_BY, FIELDS, JOINED, METHOD_NAMES, names_with
from open_instruct.flags.declare import unusable_text
from open_instruct.flags.optimization import MAX_SEED
from open_instruct.small_files import read_yaml

MAX_TRIALS = 10_000
MAX_BOUND = 1e9  # of a searched range
MAX_NAME = 100  # characters: names of trials' folders and the pictures' legends hold them
SEARCH_KINDS = ("grid", "random", "halving")
ANSWER_METRICS = tuple(name for name in METRICS if name != "loss")  # losses are measured in any case
REPORT_KEYS = {
    *("questions", "max_new_tokens", "answer_regex", "normalise", "metrics", "similarity_model", "other_text"),
    *("files", "system"),
}
# Data, tokens and precision: a comparison in which methods differ in these says nothing about the methods.
SAME_FOR_ALL = names_with("in_study", "same")
SET_BY_STUDY = names_with("in_study", "decided")


@dataclass(frozen=True)
class Axis:
    """A searched flag: listed values, or a range that is sampled on a log scale."""

    name: str
    values: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class MethodSpec:
    """A competitor in the study: a method, the flags that only it has, and the axes along which it is searched."""

    name: str
    method: str
    flags: dict[str, Any]
    space: tuple[Axis, ...]


@dataclass(frozen=True)
class Study:
    """All settings of a study's file."""

    name: str
    path: Path
    output_dir: Path
    flags: dict[str, Any]
    specs: tuple[MethodSpec, ...]
    search_kind: str
    num_candidates: int  # of each method, in random search and halving
    eta: int  # halving: the best 1 / eta of the candidates continue, with eta times the steps
    search_seed: int
    seeds: tuple[int, ...]
    num_questions: int = 50  # answered by each trial
    max_new_tokens: int = 128
    answer_regex: str | None = None
    normalise: str = "none"
    metrics: tuple[str, ...] = ()  # some of ANSWER_METRICS, and FILE.py:FUNCTION; exact match is always measured
    similarity_model: str | None = None  # compares answers and references by their embeddings
    files: tuple[tuple[str, str], ...] = ()  # (name, file) of further questions that each trial answers
    system: str | None = None  # system message of their conversations that have none
    other_text: Path | None = None  # on which forgetting is measured
    keep_full_weights: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """Return the settings on which a trial's answers depend, as JSON: trials that differ in them don't compare."""
        files = {"files": dict(self.files), "system": self.system} if self.files else {}
        return {"questions": self.num_questions, "max_new_tokens": self.max_new_tokens, **files}


def read_study(path: Path) -> Study:
    """Read and check a study's file.

    Raises:
        InputError: the file can't be read, or something in it is wrong; every problem is named at once.
    """
    content = read_yaml(path, f"study {path}")
    problems: list[str] = []
    known = {"name", "output_dir", "flags", "methods", "search", "seeds", "report", "keep_full_weights"}
    check_keys(content, known, "", problems)
    flags = mapping(content, "flags", problems)
    search = mapping(content, "search", problems)
    report = mapping(content, "report", problems)
    check_keys(search, {"kind", "points", "eta", "seed", "space"}, "search.", problems)
    check_keys(report, REPORT_KEYS, "report.", problems)
    for key in flags:
        if flag_name(key) in SET_BY_STUDY:
            problems.append(f"flags.{key} is decided by the study: remove it")
    check_spellings(flags, "flags", problems)
    search_kind = one_of(search.get("kind", "grid"), SEARCH_KINDS, "search.kind", problems)
    shared_space = read_space(mapping(search, "space", problems, "search."), "search.space", search_kind, problems)
    specs = tuple(
        method_spec(name, content, shared_space, search_kind, problems)
        for name, content in mapping(content, "methods", problems).items()
    )
    if not specs:
        problems.append(f"methods is empty: name at least one of {', '.join(METHOD_NAMES)}")
    name = content.get("name") or path.stem
    check_label(name, "name", problems)
    output_dir = content.get("output_dir") or f"output/studies/{name}"
    if not isinstance(output_dir, str) or unusable_text(output_dir):
        problems.append(f"output_dir {visible(str(output_dir))!r} is no name of a folder")
    keeps = content.get("keep_full_weights", False)
    if not isinstance(keeps, bool):
        problems.append(f"keep_full_weights {keeps!r} is neither true nor false")
    study = Study(
        name=str(name),
        path=path,
        output_dir=Path(str(output_dir)),
        flags=flags,
        specs=specs,
        search_kind=search_kind,
        num_candidates=integer(search, "points", 20, 1, "search.", problems),
        eta=integer(search, "eta", 3, 2, "search.", problems),
        search_seed=integer(search, "seed", 0, 0, "search.", problems, MAX_SEED),
        seeds=read_seeds(content.get("seeds", [1, 2, 3]), problems),
        num_questions=integer(report, "questions", 50, 0, "report.", problems),
        max_new_tokens=integer(report, "max_new_tokens", 128, 1, "report.", problems),
        answer_regex=report.get("answer_regex"),
        normalise=one_of(report.get("normalise", "none"), NORMALISERS, "report.normalise", problems),
        metrics=answer_metrics_of(report.get("metrics"), problems),
        similarity_model=text(report, "similarity_model", "report.", problems),
        files=question_files(mapping(report, "files", problems, "report."), problems),
        system=text(report, "system", "report.", problems),
        other_text=Path(str(report["other_text"])) if report.get("other_text") else None,
        keep_full_weights=keeps is True,
    )
    check_whole_study(study, problems)
    if problems:
        raise InputError(f"study {path}: " + "; ".join(problems))
    return study


def check_whole_study(study: Study, problems: list[str]) -> None:
    """Add to `problems` what is wrong with parts of a study only in combination."""
    if study.search_kind == "grid":
        budgets = {spec.name: math.prod(len(axis.values) for axis in spec.space) for spec in study.specs}
        if len(set(budgets.values())) > 1:
            seen = ", ".join(f"{name} {num_points}" for name, num_points in budgets.items())
            problems.append(
                f"methods have unequal tuning budgets ({seen} points): give each as many, or use search.kind random"
            )
    else:
        unsearched = [spec.name for spec in study.specs if not spec.space]
        if unsearched:
            problems.append(f"{', '.join(unsearched)}: nothing to search: give search.space, or use search.kind grid")
    max_steps = study.flags.get("max_train_steps")
    if study.search_kind == "halving" and (type(max_steps) is not int or max_steps < 1):
        problems.append("search.kind halving shortens runs: set flags.max_train_steps to a number of steps")
    num_trials = sum(most_trials(study, spec) for spec in study.specs)
    if num_trials > MAX_TRIALS:
        problems.append(f"there are {num_trials:,} trials, and {MAX_TRIALS:,} are allowed: search fewer points")
    if study.answer_regex is not None:
        try:
            check_regex(study.answer_regex, "report.answer_regex")
        except InputError as error:
            problems.append(str(error))
    if not study.num_questions and (study.metrics or study.similarity_model):
        problems.append("report.metrics and report.similarity_model need answers, and report.questions is 0: drop them")
    if study.files and not study.num_questions:
        problems.append("report.files has no effect, as report.questions is 0: drop it")
    if study.system and not study.files:
        problems.append("report.system belongs to report.files, as held-out rows are asked as in training: drop it")
    if study.other_text and not study.other_text.is_file():
        problems.append(f"report.other_text {study.other_text}: no such file")


def most_trials(study: Study, spec: MethodSpec) -> int:
    """Return about how many trials a method's search takes."""
    num_seeds = len(study.seeds)
    if study.search_kind == "grid":
        return math.prod(len(axis.values) for axis in spec.space) * num_seeds
    return 2 * study.num_candidates + num_seeds if study.search_kind == "halving" else study.num_candidates + num_seeds


def check_label(name: Any, source: str, problems: list[str]) -> None:
    """Add a name to `problems` that can't be part of the name of a folder, or that no report could show."""
    is_name = isinstance(name, str) and name.strip() == name and name.isprintable() and 0 < len(name) <= MAX_NAME
    if not is_name or name.startswith((".", "-")) or "/" in name or "\\" in name:
        shown = visible(str(name))[:MAX_NAME]
        problems.append(
            f"{source} {shown!r} is no name: use up to {MAX_NAME} characters that can be seen, without / and \\, "
            "and no dash or point at the start"
        )


def check_spellings(content: dict[str, Any], source: str, problems: list[str]) -> None:
    """Add to `problems` a flag that stands there twice, once with dashes: one of the two would be lost."""
    names = [flag_name(key) for key in content]
    problems += [f"{source}.{name} is set twice: remove one" for name in dict.fromkeys(names) if names.count(name) > 1]


def method_spec(
    name: str, content: Any, shared_space: tuple[Axis, ...], search_kind: str, problems: list[str]
) -> MethodSpec:
    """Read an item of `methods`: flags, and the reserved keys `method` and `space`.

    Args:
        name: the item's key, which is also the method unless `content` names another.
        content: the item's value, as read from the file.
        shared_space: the axes of `search.space`. The item's own flags and axes replace those of the same name.
        search_kind: one of `SEARCH_KINDS`.
        problems: receives what is wrong.
    """
    content = content or {}
    if not isinstance(content, dict):
        problems.append(f"methods.{name} is {content!r}: it must map flags to values")
        content = {}
    check_label(name, "methods", problems)
    source = f"methods.{name}" + (".method" if "method" in content else "")
    method = one_of(content.get("method", name), (*METHOD_NAMES, *JOINED), source, problems)
    own_space = mapping(content, "space", problems, f"methods.{name}.")
    flags = {key: value for key, value in content.items() if key not in ("method", "space")}
    check_spellings({**flags, **own_space}, f"methods.{name}", problems)
    for key in dict.fromkeys([*flags, *own_space]):
        if flag_name(key) in (*SAME_FOR_ALL, *SET_BY_STUDY):
            problems.append(f"methods.{name}.{key} must be the same for all methods: set it under flags")
    chosen_by = CHOSEN_BY.get(method)
    if chosen_by and FIELDS[chosen_by].default is None and chosen_by not in map(flag_name, (*flags, *own_space)):
        problems.append(f"methods.{name} is of the method {method}, which {chosen_by} chooses: set it there")
    space = {axis.name: axis for axis in shared_space if axis.name not in flags}
    space |= {axis.name: axis for axis in read_space(own_space, f"methods.{name}.space", search_kind, problems)}
    return MethodSpec(str(name), method, flags, tuple(space.values()))


def flag_name(key: Any) -> str:
    """Return the flag that a key sets: dashes count as underscores, and `no_x` sets x."""
    return flags_in([f"--{key}"])[0]


def read_space(content: dict[str, Any], source: str, search_kind: str, problems: list[str]) -> tuple[Axis, ...]:
    """Read the axes of a search: `flag: [values]` or `flag: {low: …, high: …}`.

    Args:
        content: the axes, as read from the file.
        source: their path in the file, for messages.
        search_kind: one of `SEARCH_KINDS`.
        problems: receives what is wrong; such axes are left out.
    """
    axes = []
    for name, value in content.items():
        if flag_name(name) in (*SAME_FOR_ALL, *SET_BY_STUDY):
            problems.append(f"{source}.{name} must be the same for all trials: set it under flags, or seeds")
        elif isinstance(value, list) and value:
            axes.append(Axis(name, tuple(value)))
        elif not isinstance(value, dict) or set(value) != {"low", "high"}:
            problems.append(f"{source}.{name} is {value!r}: give a list of values, or {{low: …, high: …}}")
        elif search_kind == "grid":
            problems.append(
                f"{source}.{name} is a range: a grid needs a list of values; ranges are for random and halving"
            )
        elif (
            not all(type(number) in (int, float) and 0 < number < MAX_BOUND for number in value.values())
            or not value["low"] < value["high"]
        ):
            problems.append(
                f"{source}.{name} {value}: both bounds must be positive numbers (1.0e-3, not 1e-3), low below high"
            )
        else:
            axes.append(Axis(name, low=value["low"], high=value["high"]))
    return tuple(axes)


def mapping(content: dict[str, Any], name: str, problems: list[str], source: str = "") -> dict[str, Any]:
    """Return the mapping under a key, empty where the key is missing. `methods` may also be a list of names."""
    value = content.get(name)
    value = {} if value is None else value
    if isinstance(value, dict):
        return value
    if name == "methods" and isinstance(value, list) and len(set(map(str, value))) == len(value):
        return dict.fromkeys(map(str, value))
    problems.append(f"{source}{name} is {value!r}: it must map names to values")
    return {}


def check_keys(content: dict[str, Any], known: set[str], source: str, problems: list[str]) -> None:
    """Add unknown keys to `problems`: nothing would read them, so the mistake would be silent."""
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            remedy = f", did you mean {near[0]}?" if near else f": known are {', '.join(sorted(known))}"
            problems.append(f"unknown {source}{name}{remedy}")


def one_of(value: Any, choices: tuple[str, ...], source: str, problems: list[str]) -> str:
    """Return the value if it is among the choices, else the first choice."""
    if value not in choices:
        problems.append(f"{source} {value!r} is not known: choose {', '.join(choices)}")
        return choices[0]
    return str(value)


def integer(
    content: dict[str, Any],
    name: str,
    default: int,
    smallest: int,
    source: str,
    problems: list[str],
    largest: int = 10**9,
) -> int:
    """Return the integer under a key, or the default where it is missing, no integer, or out of bounds."""
    value = content.get(name, default)
    if type(value) is not int or not smallest <= value <= largest:
        problems.append(f"{source}{name} {value!r} is not a whole number of at least {smallest} and at most {largest}")
        return default
    return value


def text(content: dict[str, Any], name: str, source: str, problems: list[str]) -> str | None:
    """Return the text under a key, or None where it is missing or can't be used."""
    value = content.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or unusable_text(value):
        problems.append(f"{source}{name} {visible(str(value))[:200]!r} is no text: give one, or remove it")
        return None
    return value


def answer_metrics_of(value: Any, problems: list[str]) -> tuple[str, ...]:
    """Return the figures of answers: names, and functions of the user, as FILE.py:FUNCTION."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        problems.append(
            f"report.metrics {str(value)[:200]}: give a list of {', '.join(ANSWER_METRICS)}, FILE.py:FUNCTION"
        )
        return ()
    for word in value:
        if word not in ANSWER_METRICS and ".py:" not in word:
            problems.append(
                f"report.metrics {visible(word)[:200]!r} is not known: choose {', '.join(ANSWER_METRICS)}, or name a "
                "function of yours as FILE.py:FUNCTION"
            )
    if len(set(value)) < len(value):
        problems.append(f"report.metrics {', '.join(value)[:200]}: one stands there twice")
    return tuple(value)


def question_files(content: dict[str, Any], problems: list[str]) -> tuple[tuple[str, str], ...]:
    """Return name and file of further questions."""
    for name, file in content.items():
        try:
            if not isinstance(file, str) or named_files([f"{name}={file}"], "report.files") != {name: file}:
                raise InputError(
                    f"report.files.{visible(str(name))[:MAX_NAME]}: give NAME: FILE, without slash in NAME"
                )
        except InputError as error:
            problems.append(str(error))
    return tuple((str(name), str(file)) for name, file in content.items())


def read_seeds(value: Any, problems: list[str]) -> tuple[int, ...]:
    """Return the study's seeds: at least one, each a whole number, no two alike."""
    are_numbers = isinstance(value, list) and value and all(type(seed) is int for seed in value)
    if not are_numbers or len(set(value)) < len(value) or not all(0 <= seed <= MAX_SEED for seed in value):
        problems.append(f"seeds {str(value)[:200]}: give a list of different whole numbers from 0 to {MAX_SEED}")
        return (1,)
    return tuple(value)
