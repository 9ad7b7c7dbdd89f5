"""A study's results in plain sentences. Each is computed; none is written down beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from open_instruct.ranking import finite_or_inf
from open_instruct.study.answers import EXACT_MATCH, LOSS, TEST, AnswerFigure
from open_instruct.study.figures import COSTS, FailedMethod, MethodFigures, PairDifference, StudyFigures, pareto_front
from open_instruct.study.results import params_name

FEW_SEEDS = 5  # below: the bootstrap over seeds draws from too few


def summarise(figures: StudyFigures, num_missing: int, num_workers: int) -> list[str]:
    """Return what a reader should take home, most important first.

    Args:
        figures: the study's figures.
        num_missing: trials that are known to be needed and have not run.
        num_workers: trials that ran at a time.
    """
    methods = figures.methods
    sentences: list[str | None] = []
    if num_missing:
        sentences.append(f"The study is not complete: {num_missing} of the trials that are known so far have not run.")
    sentences += [
        f"On {figures.num_test_rows} test rows with {figures.num_test_tokens:,} labelled tokens the base model's loss "
        f"is {figures.base.loss:.4f} nats per token; another {figures.num_choosing_rows} held-out rows served to "
        "choose each method's point.",
        winner(methods, figures.pairs),
        against_base(methods),
        rates_at_the_edge(methods),
        recipes(methods),
        rate_sensitivity(methods),
        pareto_fronts(methods),
        answers(figures) if figures.num_questions else None,
        *(best_answers(figure) for figure in figures.answers if (figure.asked, figure.figure) != (TEST, EXACT_MATCH)),
        forgetting(figures) if figures.num_other_tokens else None,
        *limits(figures, num_workers),
    ]
    return [sentence for sentence in sentences if sentence is not None]


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    if not names:
        return "none"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def winner(methods: Sequence[MethodFigures], pairs: Sequence[PairDifference]) -> str:
    """Name the method with the lowest loss, and the methods from which it differs by more than chance."""
    best = methods[0]
    low, high = best.test.interval
    text = (
        f"{best.name} has the lowest test loss, {best.test.value:.4f} [{low:.4f}, {high:.4f}], "
        f"with {params_name(best.params)}"
    )
    clear = [pair.worse for pair in pairs if pair.better == best.name and pair.clear]
    unclear = [pair.worse for pair in pairs if pair.better == best.name and not pair.clear]
    if clear:
        text += f"; the difference is larger than chance would explain against {listed(clear)}"
        text += f", but not against {listed(unclear)}" if unclear else ""
    elif unclear:
        text += f"; no larger than chance against {listed(unclear)}"
    return text + "."


def against_base(methods: Sequence[MethodFigures]) -> str:
    """Name the methods that learned, and those that did not."""
    below = [method.name for method in methods if method.less_base.interval[1] < 0]
    above = [method.name for method in methods if method.less_base.value >= 0]
    unclear = [method.name for method in methods if method.name not in (*below, *above)]
    if len(below) == len(methods):
        return "Every method ends below its base model, by more than chance would explain."
    parts = [f"below the base model by more than chance: {listed(below)}"]
    parts += [f"below it by no more than chance: {listed(unclear)}"] if unclear else []
    parts += [f"not below it: {listed(above)}"] if above else []
    return "Against the base model: " + "; ".join(parts) + "."


def rates_at_the_edge(methods: Sequence[MethodFigures]) -> str | None:
    """Name the methods whose best rate is at an end of what was searched: their optimum may lie outside."""
    at_edge = [
        method.name
        for method in methods
        if len(method.rates) > 1 and method.learning_rate in (method.rates[0][0], method.rates[-1][0])
    ]
    if not at_edge:
        return None
    return (
        f"The chosen learning rate of {listed(at_edge)} is the lowest or highest that was tried, so a better one may "
        "lie outside the search."
    )


def recipes(methods: Sequence[MethodFigures]) -> str | None:
    """Say how far each recipe's loss is from that of the chosen parameters, where the recipe was tried."""
    gaps = [
        f"{method.name} {method.recipe / method.test.value - 1:+.1%}" for method in methods if method.recipe is not None
    ]
    return f"The recipe's own point, against the chosen one: {', '.join(gaps)} test loss." if gaps else None


def rate_sensitivity(methods: Sequence[MethodFigures]) -> str | None:
    """Say how much the worst of the tried rates costs."""
    spread = {
        method.name: max(loss for _, loss in method.rates) / min(loss for _, loss in method.rates)
        for method in methods
        if len(method.rates) > 1
    }
    if not spread:
        return None
    least, most = min(spread, key=spread.__getitem__), max(spread, key=spread.__getitem__)
    if least == most:
        return f"Over the learning rates tried, the test loss of {least} varies by a factor of {spread[least]:.2f}."
    return (
        f"Over the learning rates tried, the test loss varies least for {least} (by a factor of {spread[least]:.2f} "
        f"between best and worst) and most for {most} ({spread[most]:.2f})."
    )


def pareto_fronts(methods: Sequence[MethodFigures]) -> str:
    """Name the methods that no other beats in both loss and cost."""
    parts = []
    for cost in COSTS:
        front = pareto_front({method.name: (cost.of(method), method.test.value) for method in methods})
        parts.append(f"{cost.name}: {listed(front)}")
    return "No other method is better in both test loss and " + "; ".join(parts) + "."


def answers(figures: StudyFigures) -> str:
    """Say how many questions are answered right, by the base model and by the best method."""
    best = max(figures.methods, key=lambda method: method.exact)
    return (
        f"Of {figures.num_questions} test questions the base model answers {figures.base.exact:.0%} exactly right; "
        f"the most is {best.exact:.0%} ({best.name})."
    )


def best_answers(figure: AnswerFigure) -> str:
    """Name the method with the highest figure, or lowest loss, and those from which it differs by more than chance."""
    most, beyond = ("lowest", "below") if figure.figure == LOSS else ("highest", "above")
    best = figure.methods[0]
    low, high = best.interval
    text = f"{best.name} has the {most} {figure.title}, {best.value:.4f} [{low:.4f}, {high:.4f}]"
    clear = [pair.second for pair in figure.pairs if pair.first == best.name and pair.clear]
    unclear = [pair.second for pair in figure.pairs if pair.first == best.name and not pair.clear]
    text += f", {beyond} {listed(clear)} by more than chance" if clear else ""
    text += f", no more than chance {beyond} {listed(unclear)}" if unclear else ""
    return f"{text}; the base model's is {figure.base:.4f}."


def forgetting(figures: StudyFigures) -> str:
    """Say which methods change the loss on other text least and most."""
    least = min(figures.methods, key=lambda method: finite_or_inf(method.forgetting))
    most = max(figures.methods, key=lambda method: finite_or_inf(method.forgetting))
    text = f"On text that was not trained for (base loss {figures.base.other:.4f}), {least.name}"
    if least is most:
        return f"{text} changes the loss by {least.forgetting:+.4f}."
    return (
        f"{text} forgets least ({least.forgetting:+.4f} nats per token) and {most.name} most ({most.forgetting:+.4f})."
    )


def limits(figures: StudyFigures, num_workers: int) -> list[str]:
    """Say what the figures can't show."""
    methods = figures.methods
    sentences = []
    num_seeds = min(len(method.seeds) for method in methods)
    if num_seeds < FEW_SEEDS:
        sentences.append(
            f"With {num_seeds} seed{'s' if num_seeds > 1 else ''} a method, intervals say much about rows and little "
            "about seeds: take small differences as undecided."
        )
    sentences.append(budgets(figures))
    for seed, token_counts in figures.unequal_tokens.items():
        counts = ", ".join(f"{num_tokens:,}" for num_tokens in token_counts)
        sentences.append(f"With seed {seed}, trials trained on different numbers of tokens: {counts}.")
    for name, (form, loss) in figures.quantised.items():
        sentences.append(f"{name} starts from a base quantised to {form}, whose test loss is {loss:.4f}.")
    if figures.on_cpu:
        sentences.append(
            "Peak memory is that of the process, most of it libraries and what earlier trials left: small differences "
            "mean nothing."
        )
    if figures.failed_methods:
        names = listed([method.name for method in figures.failed_methods])
        sentences.append(
            f"No point of {names} finished with a finite loss: see trials/*/failed.json, and delete it to try again."
        )
    if num_workers > 1:
        sentences.append(
            f"Times were measured with {num_workers} trials at once, which slow each other down on shared hardware."
        )
    if any(math.isclose(method.test.value, 0, abs_tol=1e-3) for method in methods):
        sentences.append("Test losses near zero mean that the task is solved: ranks among such methods say nothing.")
    return sentences


def budgets(figures: StudyFigures) -> str:
    """Say whether all methods had the same number of trials and trained on as many tokens."""
    every_method: list[MethodFigures | FailedMethod] = [*figures.methods, *figures.failed_methods]
    num_trials = {method.num_trials for method in every_method}
    num_tokens = {method.num_searched_tokens for method in figures.methods}
    if len(num_trials) == 1 and len(num_tokens) == 1 and not any(method.num_failed for method in every_method):
        return (
            f"Every method had the same budget: {num_trials.pop()} trials, {num_tokens.pop():,} trained tokens in all."
        )
    spent = ", ".join(
        f"{method.name} {method.num_trials} trials" + (f" ({method.num_failed} failed)" if method.num_failed else "")
        for method in every_method
    )
    return f"The budgets spent so far differ: {spent}."
