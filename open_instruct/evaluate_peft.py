r"""Measure a base model and adapters on it, side by side: loss, exact match, ROUGE, BLEU, or tasks of the EleutherAI harness.

    python open_instruct/evaluate_peft.py --adapter output/run --file heldout.jsonl --output_dir output/run-evaluated
    python open_instruct/evaluate_peft.py --adapter a=output/a --adapter b=output/b --file gsm8k.jsonl \
        --answer_regex "#### (.*)" --normaliser number
    python open_instruct/evaluate_peft.py --adapter output/run --lm_eval_tasks hellaswag arc_easy

Every figure has a bootstrapped 95 % interval, and each adapter's difference from the base one on the same rows.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import open_instruct.quiet  # noqa: F401 - before the libraries that it silences
from open_instruct.adapters import answer_metrics as metrics
from open_instruct.adapters.answer_metrics import Statistic
from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.scoring import answer_losses
from open_instruct.adapters.served import Served, load
from open_instruct.command_line import OneLineArgumentParser, add_model_flags, at_least
from open_instruct.data import chat, questions, reading
from open_instruct.data.questions import Question
from open_instruct.errors import InputError, exit_code
from open_instruct.files import check_result_folder, write_result
from open_instruct.report import evaluation as comparison

METRICS = ("loss", "exact_match", "rouge", "bleu")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit code 0: done; 2: wrong input, said in one line; 130: interrupted."""
    a = parse(argv)
    return exit_code(lambda: run(a))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, dtype="auto")
    parser.add_argument("--file", metavar="FILE", help="questions with answers, in any form that training reads")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="(default: all)")
    parser.add_argument(
        "--answer_regex", help='the part of an answer that counts, for example "#### (.*)"; its last match, first group'
    )
    parser.add_argument(
        "--normaliser",
        choices=metrics.NORMALISERS,
        default="none",
        help="of answers before exact match (default: none)",
    )
    parser.add_argument("--max_samples", type=at_least(1), help="rows drawn by seed; unset: all")
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=256, help="tokens of an answer at most (default: 256)"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=16, help="rows computed at once at most (default: 16)"
    )
    parser.add_argument("--seed", type=at_least(0), default=42, help="of the rows and the bootstrap (default: 42)")
    parser.add_argument("--chat_template_name", help="as in finetune_peft.py; unset: the adapter's own")
    parser.add_argument(
        "--output_dir", metavar="DIR", help="where evaluation.json, .md and .png go; unset: they are only printed"
    )
    parser.add_argument("--lm_eval_tasks", nargs="+", metavar="TASK", help="tasks of the harness instead of --file")
    parser.add_argument(
        "--lm_eval_path", metavar="DIR", help="folder with further tasks of the harness, for machines without a network"
    )
    parser.add_argument("--limit", type=at_least(1), help="documents of each harness task")
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="put harness questions into the chat template"
    )
    a = parser.parse_args(argv)
    if bool(a.file) == bool(a.lm_eval_tasks):
        parser.error("give one of --file and --lm_eval_tasks")
    if a.answer_regex:
        try:
            re.compile(a.answer_regex)
        except re.error as error:
            parser.error(f"--answer_regex {a.answer_regex!r} is no regular expression ({error})")
    return a


def run(a: argparse.Namespace) -> None:
    """Measure, print, write."""
    check_result_folder(a.output_dir, "evaluation.json")
    asked = read_questions(a.file, a.max_samples, a.seed) if a.file else []
    if a.answer_regex and "exact_match" in a.metrics:
        references = [str(question.reference) for question in asked]
        metrics.exact_matches(references, references, a.answer_regex, a.normaliser)  # before the model is loaded
    served = load(
        a.adapter, a.model_name_or_path, a.dtype, a.any_base, a.trust_remote_code, a.chat_template_name, a.allow_pickle
    )
    if a.lm_eval_tasks:
        from open_instruct.adapters import harness

        result = harness.evaluate(served, a.lm_eval_tasks, a.lm_eval_path, a.limit, a.batch_size, a.apply_chat_template)
    else:
        result = measure(served, asked, a.metrics, a.answer_regex, a.normaliser, a.max_new_tokens, a.batch_size, a.seed)
    text = comparison.markdown(result)
    print(text)
    write_result(a.output_dir, "evaluation", text, comparison.plot, result)


def evaluate(
    file: str,
    adapter: Sequence[str] | str | None = None,
    model_name_or_path: str | None = None,
    names: Sequence[str] = METRICS,
    answer_regex: str | None = None,
    normaliser: str = "none",
    max_samples: int | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 42,
    **options: Any,
) -> dict[str, Any]:
    """Measure base and adapters on a file; the flags of `evaluate_peft.py --help` say what the arguments mean.

    Args:
        file: questions with answers.
        adapter: as `load` takes it.
        model_name_or_path: base model; unset: the one that the adapters name.
        names: of `METRICS`.
        answer_regex: the part of an answer that counts.
        normaliser: of `metrics.NORMALISERS`.
        max_samples: rows drawn by seed; None: all.
        max_new_tokens: tokens of an answer at most.
        batch_size: rows computed at once at most.
        seed: of the rows and the bootstrap.

        options: further arguments of `load`.

    Returns:
        Content of evaluation.json.

    Raises:
        InputError: wrong input.
    """
    asked = read_questions(file, max_samples, seed)
    served = load(adapter, model_name_or_path, **options)
    return measure(served, asked, names, answer_regex, normaliser, max_new_tokens, batch_size, seed)


def read_questions(file: str, most: int | None, seed: int) -> list[Question]:
    """Questions that have an answer, in the file's order.

    Raises:
        InputError: one has none.
    """
    asked = list(questions.questions(reading.read_files(reading.files_of(file))))
    without = next((question.place for question in asked if question.reference is None), None)
    if without:
        raise InputError(
            f"{without}: no answer to compare with: give rows that end with the assistant's turn, or use generate_peft.py"
        )
    if not asked:
        raise InputError(f"{file} holds no row: there is nothing to measure")
    if most and most < len(asked):
        chosen = np.sort(np.random.default_rng([seed, 0xE7]).permutation(len(asked))[:most])
        asked = [asked[i] for i in chosen]
    return asked


def measure(
    served: Served,
    asked: Sequence[Question],
    names: Sequence[str],
    answer_regex: str | None,
    normaliser: str,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """All figures of base and adapters; see `evaluate`."""
    draws = metrics.resamples(len(asked), seed)
    references = [str(question.reference) for question in asked]
    everyone = [BASE, *served.names]
    room = min(
        (room for room in map(served.room, everyone) if room), default=None
    )  # one for all, so that they score the same tokens
    found, answers = {}, {}
    truncated = unanswered = 0
    for name in everyone:
        statistics: dict[str, Statistic] = {}
        if "loss" in names:
            losses, truncated = loss_statistics(served, name, asked, room, batch_size)
            statistics |= losses
        if set(names) - {"loss"}:
            prompts = [questions.prompt_ids(served.tokenizer, question.messages) for question in asked]
            unanswered = sum(len(prompt) >= room for prompt in prompts) if room else 0
            given = dict(served.stream(prompts, name, Sampling(max_new_tokens=max_new_tokens), batch_size))
            answers[name] = [given[i][0] for i in range(len(asked))]
            statistics |= answer_statistics(answers[name], references, names, answer_regex, normaliser)
        found[name] = metrics.figures(statistics, len(asked), draws)
    result: dict[str, Any] = {
        "model": str(served.adapters.base.config._name_or_path),
        "adapters": {name: str(folder.path) for name, folder in served.adapters.folders.items()},
        "rows": len(asked),
        "truncated": truncated,
        "unanswered": unanswered,
        "answer_regex": answer_regex,
        "normaliser": normaliser,
        "figures": found,
        "differences_from_base": {name: metrics.differences(found[name], found[BASE]) for name in served.names},
        "examples": [
            {"question": question.text, "reference": question.reference, **{name: answers[name][i] for name in answers}}
            for i, question in enumerate(asked[:20])
        ],
    }
    for figures in result["figures"].values():
        for figure in figures.values():
            del figure["drawn"]
    return result


def loss_statistics(
    served: Served, name: str, asked: Sequence[Question], room: int | None, batch_size: int
) -> tuple[dict[str, Statistic], int]:
    """Loss and perplexity per labelled token, and how many rows were cut; every assistant's turn counts, as in training."""
    messages = [[*question.messages, {"role": "assistant", "content": question.reference}] for question in asked]
    ids, spans = chat.tokenize(served.tokenizer, messages, room or 1 << 30)
    sums = np.array(answer_losses(served.adapters.use(name), ids, spans, batch_size))
    if not sums[:, 1].sum():
        raise InputError(
            f"no row has a labelled token within the {room} that the model has room for: give shorter rows"
        )

    def loss(rows: np.ndarray) -> float:
        total = sums[rows].sum(0)
        return float(total[0] / total[1]) if total[1] else math.nan

    return {"loss": loss, "perplexity": lambda rows: math.exp(min(loss(rows), 700.0))}, sum(
        len(row) == room for row in ids
    )


def answer_statistics(
    answers: Sequence[str], references: Sequence[str], names: Sequence[str], regex: str | None, normaliser: str
) -> dict[str, Statistic]:
    """Figures of generated answers."""
    per_row: dict[str, np.ndarray] = {}
    if "exact_match" in names:
        per_row["exact_match"] = metrics.exact_matches(answers, references, regex, normaliser)
    if "rouge" in names:
        per_row |= metrics.rouge(answers, references)
    found: dict[str, Statistic] = {name: mean_of(values) for name, values in per_row.items()}
    if "bleu" in names:
        found["bleu"] = metrics.Bleu.of(answers, references).score
    return found


def mean_of(values: np.ndarray) -> Statistic:
    """The mean over rows."""
    return lambda rows: float(values[rows].mean())


if __name__ == "__main__":
    sys.exit(main())
