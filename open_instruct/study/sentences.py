"""A study's results in plain sentences. Each is computed; none is written down beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from open_instruct.study.figures import front, point_name

COSTS = {
    "trained": "trained parameters",
    "seconds": "training time",
    "memory_mb": "peak memory",
    "bytes": "size on disk",
}


def sentences(figures: dict[str, Any], missing: int, workers: int) -> list[str]:
    """What a reader should take home, most important first."""
    methods = [method for method in figures["methods"] if method["works"]]
    found = []
    if missing:
        found.append(f"The study is not complete: {missing} of the trials that are known so far have not run.")
    base = figures["base"]["loss"]
    found.append(
        f"On {figures['test_rows']} test rows with {figures['test_tokens']:,} labelled tokens the base model's loss is {base:.4f} nats per "
        f"token; another {figures['choosing_rows']} held-out rows served to choose each method's point."
    )
    found.append(winner(methods, figures["pairs"]))
    found.append(against_base(methods))
    found += [sentence for sentence in (chosen_rates(methods), recipes(methods), sensitivity(methods)) if sentence]
    found.append(fronts(methods))
    if figures["questions"]:
        found.append(answers(methods, figures))
    if figures["other_tokens"]:
        found.append(forgetting(methods, figures))
    found += limits(figures, methods, workers)
    return found


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "none"


def winner(methods: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str:
    """The lowest loss, and from which others it differs by more than chance."""
    best = methods[0]
    low, high = best["test"]["interval"]
    text = f"{best['name']} has the lowest test loss, {best['test']['value']:.4f} [{low:.4f}, {high:.4f}], with {point_name(best['point'])}"
    mine = [pair for pair in pairs if pair["better"] == best["name"]]
    clear = [pair["worse"] for pair in mine if pair["clear"]]
    unclear = [pair["worse"] for pair in mine if not pair["clear"]]
    if not mine:
        return text + "."
    parts = []
    if clear:
        parts.append(f"the difference is larger than chance would explain against {listed(clear)}")
    if unclear:
        parts.append(
            f"{'but ' if clear else ''}not against {listed(unclear)}"
            if clear
            else f"no larger than chance against {listed(unclear)}"
        )
    return f"{text}; {', '.join(parts)}."


def against_base(methods: list[dict[str, Any]]) -> str:
    """Who learned."""
    below = [m["name"] for m in methods if m["less_base"]["interval"][1] < 0]
    above = [m["name"] for m in methods if m["less_base"]["value"] >= 0]
    unclear = [m["name"] for m in methods if m["name"] not in (*below, *above)]
    if len(below) == len(methods):
        return "Every method ends below its base model, by more than chance would explain."
    parts = [f"below the base model by more than chance: {listed(below)}"]
    parts += [f"below it by no more than chance: {listed(unclear)}"] if unclear else []
    parts += [f"not below it: {listed(above)}"] if above else []
    return "Against the base model: " + "; ".join(parts) + "."


def chosen_rates(methods: list[dict[str, Any]]) -> str | None:
    """Methods whose best rate is at an end of what was searched: their optimum may lie outside."""
    edge = [
        m["name"]
        for m in methods
        if len(m["rates"]) > 1 and m["learning_rate"] in (m["rates"][0][0], m["rates"][-1][0])
    ]
    if not edge:
        return None
    return f"The chosen learning rate of {listed(edge)} is the lowest or highest that was tried, so a better one may lie outside the search."


def recipes(methods: list[dict[str, Any]]) -> str | None:
    """How far the recipe is from the chosen point, where it was among the points."""
    known = [(m["name"], m["recipe"] / m["test"]["value"] - 1) for m in methods if m["recipe"] is not None]
    if not known:
        return None
    return (
        "The recipe's own point, against the chosen one: "
        + ", ".join(f"{name} {gap:+.1%}" for name, gap in known)
        + " test loss."
    )


def sensitivity(methods: list[dict[str, Any]]) -> str | None:
    """How much the worst of the tried rates costs."""
    spread = {
        m["name"]: max(v for _, v in m["rates"]) / min(v for _, v in m["rates"]) for m in methods if len(m["rates"]) > 1
    }
    if not spread:
        return None
    calm, wild = min(spread, key=spread.__getitem__), max(spread, key=spread.__getitem__)
    if calm == wild:
        return f"Over the learning rates tried, the test loss of {calm} varies by a factor of {spread[calm]:.2f}."
    return (
        f"Over the learning rates tried, the test loss varies least for {calm} (by a factor of {spread[calm]:.2f} between best and worst) "
        f"and most for {wild} ({spread[wild]:.2f})."
    )


def fronts(methods: list[dict[str, Any]]) -> str:
    """Who is not beaten in both loss and cost."""
    parts = [f"{words}: {listed(front(methods, cost))}" for cost, words in COSTS.items()]
    return "No other method is better in both test loss and " + "; ".join(parts) + "."


def answers(methods: list[dict[str, Any]], figures: dict[str, Any]) -> str:
    """Exact match."""
    best = max(methods, key=lambda m: m["exact"])
    return (
        f"Of {figures['questions']} test questions the base model answers {figures['base']['exact']:.0%} exactly right; the most is "
        f"{best['exact']:.0%} ({best['name']})."
    )


def forgetting(methods: list[dict[str, Any]], figures: dict[str, Any]) -> str:
    """Change of the loss on other text."""
    least, most = min(methods, key=lambda m: m["forgetting"]), max(methods, key=lambda m: m["forgetting"])
    return (
        f"On text that was not trained for (base loss {figures['base']['other']:.4f}), {least['name']} changes the loss "
        f"by {least['forgetting']:+.4f}"
        if least is most
        else f"On text that was not trained for (base loss {figures['base']['other']:.4f}), {least['name']} forgets least "
        f"({least['forgetting']:+.4f} nats per token) and {most['name']} most ({most['forgetting']:+.4f})"
    ) + "."


def limits(figures: dict[str, Any], methods: list[dict[str, Any]], workers: int) -> list[str]:
    """What the figures can't say."""
    found = []
    seeds = min(len(m["seeds"]) for m in methods)
    if seeds < 5:
        found.append(
            f"With {seeds} seed{'s' if seeds > 1 else ''} a method, intervals say much about rows and little about seeds: take small "
            "differences as undecided."
        )
    counts = {m["trials"] for m in figures["methods"]}
    budget = {m["searched_tokens"] for m in methods}
    if len(counts) == 1 and len(budget) == 1 and not any(m["failed"] for m in figures["methods"]):
        found.append(
            f"Every method had the same budget: {counts.pop()} trials, {budget.pop():,} trained tokens in all."
        )
    else:
        seen = ", ".join(
            f"{m['name']} {m['trials']} trials" + (f" ({m['failed']} failed)" if m["failed"] else "")
            for m in figures["methods"]
        )
        found.append(f"The budgets spent so far differ: {seen}.")
    for seed, tokens in figures["unequal_tokens"].items():
        found.append(
            f"With seed {seed}, trials trained on different numbers of tokens: {', '.join(f'{number:,}' for number in tokens)}."
        )
    for name, (bits, value) in figures["quantised"].items():
        found.append(f"{name} starts from a base quantised to {bits}, whose test loss is {value:.4f}.")
    if figures["on_cpu"]:
        found.append(
            "Peak memory is the whole process's, most of it libraries and what earlier trials left: small differences mean nothing."
        )
    broken = [m["name"] for m in figures["methods"] if not m["works"]]
    if broken:
        found.append(f"No point of {listed(broken)} finished: see trials/*/failed.json, and delete it to try again.")
    if workers > 1:
        found.append(
            f"Times were measured with {workers} trials at once, which slow each other down on shared hardware."
        )
    if any(math.isclose(m["test"]["value"], 0, abs_tol=1e-3) for m in methods):
        found.append("Test losses near zero mean that the task is solved: ranks among such methods say nothing.")
    return found
