"""Results of blind comparisons, as the page of `--blind_sheet` lets a person download them → figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from open_instruct.adapters import answer_metrics
from open_instruct.adapters.answer_files import AnsweredQuestion
from open_instruct.errors import InputError
from open_instruct.report.blind import MAX_MODELS, sheet_page
from open_instruct.small_files import read_json

MAX_BYTES = 1 << 26
REMEDY = "give the JSON file that the page of --blind_sheet lets you download"


def blind_sheet(rows: Sequence[AnsweredQuestion], seed: int) -> str:
    """Return the page that compares the first answers of models; see `report.blind.sheet_page`.

    Raises:
        InputError: there is only one model, or too many, or a row has no question to show.
    """
    models = list(rows[0].answers)
    if not 2 <= len(models) <= MAX_MODELS:
        raise InputError(f"--blind_sheet compares 2 to {MAX_MODELS} models: the answers are of {len(models)}")
    without = next((row for row in rows if not row.messages), None)
    if without is not None:
        raise InputError(f"{without.source}: no question to show on --blind_sheet: add `question`")
    answers = [{name: texts[0] for name, texts in row.answers.items()} for row in rows]
    return sheet_page([row.messages for row in rows], answers, seed)


def count_results(files: Sequence[str] | str, seed: int = 42) -> dict[str, Any]:
    """Return how often each model was preferred, with intervals over questions.

    A judgement gives 1 to the chosen model, or 1/M to each of M models that are equally good. A question's value is the
    mean over its judges.

    Args:
        files: results of the same sheet, one for each judge.
        seed: seed of the bootstrap.

    Returns:
        Content of evaluation.json.

    Raises:
        InputError: a file holds no results, those of another sheet, or of a judge who is there already.
    """
    paths = [files] if isinstance(files, str) else list(files)
    sheets = [read_results(path) for path in paths]
    judges: dict[str, str] = {}
    for path, sheet in zip(paths, sheets, strict=True):
        if any(sheet[name] != sheets[0][name] for name in ("sheet", "models", "questions")):
            raise InputError(f"{path} is of another sheet than {paths[0]}: count each sheet by itself")
        judge = sheet["judge"] or Path(path).stem
        if judge in judges:
            raise InputError(f"{path} and {judges[judge]} are both of judge {judge!r}: give one, or rename in the file")
        judges[judge] = path
    models: list[str] = sorted(sheets[0]["models"], key=lambda name: name != "base")
    chosen = defaultdict(list)  # by question
    num_first = num_judged = 0
    for sheet in sheets:
        for judgement in sheet["judgements"]:
            chosen[judgement["question"]].append(judgement["chosen"])
            num_first += judgement["chosen"] == judgement["order"][0]
            num_judged += 1
    if not chosen:
        raise InputError(f"{', '.join(paths)}: no question was judged yet")
    shares = {
        name: np.array(
            [np.mean([1 / len(models) if one is None else one == name for one in each]) for each in chosen.values()]
        )
        for name in models
    }
    draws = answer_metrics.resamples(len(chosen), seed)
    figures = {
        name: answer_metrics.figures({"preferred": answer_metrics.mean_of(values)}, np.arange(len(chosen)), draws)
        for name, values in shares.items()
    }
    differences = [
        {"model": b, "baseline": a, "figures": answer_metrics.differences(figures[b], figures[a])}
        for a, b in combinations(models, 2)
    ]
    for by_name in figures.values():
        del by_name["preferred"]["drawn"]
    agreeing = [a == b for each in chosen.values() for a, b in combinations(each, 2)]
    return {
        "results": paths,
        "sheet": sheets[0]["sheet"],
        "judges": list(judges),
        "rows": len(chosen),
        "unjudged": sheets[0]["questions"] - len(chosen),
        "judgements": num_judged,
        "equal": sum(one is None for each in chosen.values() for one in each),
        "first": num_first,
        "agreement": sum(agreeing) / len(agreeing) if agreeing else None,
        "pairs": len(agreeing),
        "figures": figures,
        "differences": differences,
    }


def read_results(path: str) -> dict[str, Any]:
    """Return one judge's results, checked.

    Raises:
        InputError: the file holds none, or was changed so that it can't be counted.
    """
    content = read_json(Path(path), f"--blind_results {path}", REMEDY, MAX_BYTES)
    kinds = {"sheet": str, "judge": str, "models": list, "questions": int, "judgements": list}
    is_result = isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items())
    if not is_result or not all(isinstance(name, str) for name in content["models"]):
        raise InputError(f"--blind_results {path} holds no results: {REMEDY}")
    seen = set()
    for number, judgement in enumerate(content["judgements"], start=1):
        where = f"--blind_results {path}: judgement {number}"
        if not isinstance(judgement, dict) or not isinstance(judgement.get("order"), list):
            raise InputError(f"{where} can't be read: {REMEDY}")
        question, order, chosen = judgement.get("question"), judgement["order"], judgement.get("chosen")
        if type(question) is not int or not 0 <= question < content["questions"] or question in seen:
            raise InputError(f"{where} is of no question of the sheet, or of one that has a judgement: {REMEDY}")
        if not all(isinstance(name, str) for name in order) or sorted(order) != sorted(content["models"]):
            raise InputError(f"{where} has other models than the sheet: {REMEDY}")
        if chosen is not None and chosen not in order:
            raise InputError(f"{where} chose none of the sheet's models: {REMEDY}")
        seen.add(question)
    return content
