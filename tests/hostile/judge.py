"""One draw: make its inputs, run it, and say what went wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.hostile.draws import ACCEPTED, KINDS, REFUSED, Draw
from tests.hostile.forks import Outcome, fork
from tests.hostile.sandbox import Sandbox, snapshot

Costs = dict[str, list[float]]  # CPU seconds of each draw, by kind


def no_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which are no JSON."""
    raise ValueError(f"{name} is no JSON")


def try_draw(seed: int, sandbox: Sandbox, folder: Path) -> tuple[Draw, Outcome, list[str]]:
    """Run the draw of a seed in a fresh folder.

    Returns:
        The draw, its outcome, and what is wrong with it: nothing, or texts.
    """
    rng = random.Random(seed)
    here = folder / f"draw-{seed}"
    here.mkdir(parents=True)
    kind = rng.choice(KINDS)
    draw = kind(rng, sandbox, here)
    draw.note = f"{kind.__name__}: {draw.note}"
    kept = {path: path.read_bytes() for path in draw.keeps}
    outcome = fork(draw.command, draw.words, here, draw.stdin)
    problems = complaints(draw, outcome)
    for path, content in kept.items():
        if not path.is_file() or path.read_bytes() != content:
            problems.append(f"lost: {path.relative_to(here)} is not what it was")
    problems += [*broken_json(here / "out"), *broken_json(here / "evaluation")] if outcome.code == 0 else []
    leftovers = [name for name in os.listdir(here) if name.startswith(".")]
    if leftovers:
        problems.append(f"left behind: {leftovers}")
    shutil.rmtree(here, ignore_errors=True)
    return draw, outcome, problems


def complaints(draw: Draw, outcome: Outcome) -> list[str]:
    """What is wrong with the way a command ended."""
    if outcome.hung:
        return ["hung"]
    if outcome.code < 0:
        return [f"killed by signal {-outcome.code}"]
    if "Traceback (most recent call last)" in outcome.err or outcome.code not in (0, 2):
        return [f"traceback, code {outcome.code}"]
    if outcome.code == 2 and len(outcome.lines) != 1:
        return [f"{len(outcome.lines)} error lines instead of one"]
    if outcome.code == 2 and len(outcome.lines[0]) > 3000:
        return ["an error line of more than 3,000 characters"]
    if outcome.code == 0 and draw.expected == REFUSED:
        return ["accepted, although it is wrong"]
    if outcome.code == 2 and draw.expected == ACCEPTED:
        return ["refused, although nothing is wrong"]
    return []


def broken_json(folder: Path) -> list[str]:
    """Files of a finished command that are no JSON."""
    problems = []
    for path in [*folder.glob("*.json"), *folder.glob("metrics.jsonl")]:
        try:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            for text in texts:
                json.loads(text, parse_constant=no_constant)
        except ValueError as error:
            if path.read_text() not in ("mine", ""):  # a user's file, which a draw put there
                problems.append(f"{path.name} is no JSON: {error}")
    return problems


def try_seeds(seeds: range, sandbox: Sandbox, folder: Path, costs: Costs | None = None) -> list[str]:
    """Run draws one after the other; one text for each that went wrong, and one if the good inputs were touched."""
    failures: list[str] = []
    before = good_inputs(sandbox)
    for seed in seeds:
        draw, outcome, problems = try_draw(seed, sandbox, folder)
        if costs is not None:
            costs.setdefault(draw.note.split(":")[0], []).append(outcome.seconds)
        after = good_inputs(sandbox)
        if after != before:
            changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
            problems.append(f"changed files that are not its own: {changed[:3]}")
            before = after
        if problems:
            failures.append(report(seed, draw, outcome, problems))
    return failures


def good_inputs(sandbox: Sandbox) -> dict[str, tuple[int, int, int]]:
    """What no draw may touch: all of the sandbox but the token cache."""
    cache = str(sandbox.root / "cache")
    return {path: seen for path, seen in snapshot(sandbox.root).items() if not path.startswith(cache)}


def report(seed: int, draw: Draw, outcome: Outcome, problems: list[str]) -> str:
    """What a failed draw was, and how it ended."""
    words = " ".join(word if len(word) < 200 else word[:200] + "…" for word in map(repr, draw.words))
    end = outcome.err.strip()[-1500:]
    return f"seed {seed}: {'; '.join(problems)}\n  {draw.command} {words}\n  {draw.note}\n  {end}\n"
