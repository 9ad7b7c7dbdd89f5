"""A page on which a person compares answers without knowing whose they are, and the count of such comparisons."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from open_instruct.report.tables import cell

TEMPLATE = Path(__file__).with_name("blind_sheet.html")
MAX_MODELS = 26  # answers of a question are called A to Z


def sheet_page(messages: Sequence[Sequence[Mapping[str, Any]]], answers: Sequence[Mapping[str, str]], seed: int) -> str:
    """Return the page: it needs no network, and shows the answers to each question in an order of its own.

    Args:
        messages: the conversation of each question.
        answers: the answer of each model to each question.
        seed: seed of the orders.
    """
    models = list(answers[0])
    generator = np.random.default_rng([seed, 0xB11D])
    orders = [[int(place) for place in generator.permutation(len(models))] for _ in answers]
    shown = [
        {
            "messages": [{"role": turn["role"], "content": turn["content"]} for turn in turns],
            "answers": [texts[models[model]] for model in order],
        }
        for turns, texts, order in zip(messages, answers, orders, strict=True)
    ]
    key = {"models": models, "orders": orders}
    digest = hashlib.sha256(json.dumps([shown, key]).encode()).hexdigest()[:16]
    encoded = base64.b64encode(json.dumps(key).encode()).decode()
    content = json.dumps({"digest": digest, "key": encoded, "questions": shown}, ensure_ascii=False)
    content = content.replace("<", "\\u003c")  # else an answer could end the script element
    before, after = TEMPLATE.read_text(encoding="utf-8").split("SHEET")
    return f"{before}{content}{after}"


def blind_tables(result: dict[str, Any]) -> str:
    """Return the count of blind comparisons in Markdown."""
    names = list(result["figures"])
    lines = [
        f"{result['judgements']:,} judgements of {result['rows']:,} questions by {', '.join(result['judges'])}, "
        "95 % intervals",
        "",
        "| figure | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
        "| preferred | " + " | ".join(cell(result["figures"][name]["preferred"]) for name in names) + " |",
        "",
        f"{result['equal']:,} times equally good or bad, which counts as a part of 1 for each. The answer that stood "
        f"first was chosen {result['first']:,} times of {result['judgements'] - result['equal']:,}.",
    ]
    if result["unjudged"]:
        lines.append(f"{result['unjudged']:,} questions of the sheet have no judgement.")
    if result["agreement"] is not None:
        lines.append(
            f"Two judges of the same question agree in {result['agreement']:.1%} of {result['pairs']:,} cases."
        )
    lines += ["", "| difference in preferred | | interval without 0 |", "|---|---|---|"]
    for pair in result["differences"]:
        figure = pair["figures"]["preferred"]
        low, high = figure["interval"]
        without = "yes" if low > 0 or high < 0 else "no"
        lines.append(f"| {pair['model']} less {pair['baseline']} | {cell(figure, sign=True)} | {without} |")
    return "\n".join(lines)
