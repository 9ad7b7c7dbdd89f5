"""A study's report: one self-contained page, the same as Markdown, and CSV, JSON and pictures.

The pages are written by templates/report.html.j2 and templates/report.md.j2; their tables are made here.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from open_instruct.adapters.answer_scores import Measures
from open_instruct.errors import visible
from open_instruct.files import write_json, write_text
from open_instruct.study.answers import (
    BASE,
    EXACT_MATCH,
    TEST,
    AnswerFigure,
    Scores,
    exact_match,
    score_all,
    title_of,
    value_of,
)
from open_instruct.study.config import Study
from open_instruct.study.figures import Estimate, MethodFigures, PairDifference, StudyFigures, analyse
from open_instruct.study.plots import draw_all
from open_instruct.study.results import StudyResults, TrialResult, other_loss, params_name
from open_instruct.study.sentences import summarise

TEMPLATES = Path(__file__).with_name("templates")
TRIAL_HEADS = {  # of the page's table, by name in trials.csv
    "method": "method",
    "point": "point",
    "seed": "seed",
    "steps": "steps",
    "learning_rate": "learning rate",
    "choosing_loss": "loss for choosing",
    "test_loss": "test loss",
    "exact_match": "exact match",
    "seconds": "s",
    "peak_memory_mb": "MB",
    "failed": "failed",
}


@dataclass(frozen=True)
class Table:
    """A table's cells as text."""

    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A picture beside the report, and the content with which a page holds it inline."""

    file: str
    caption: str
    data: str  # base64


def write_report(study: Study, results: StudyResults, num_workers: int, measures: Measures) -> str:
    """Write report.html, report.md, trials.csv, report.json and pictures into the study's folder.

    Args:
        study: the study.
        results: its finished trials.
        num_workers: trials that ran at a time.
        measures: figures of answers.

    Returns:
        The summary for the terminal.

    Raises:
        InputError: no method's parameters can be chosen, or a function of the user fails.
    """
    folder = study.output_dir
    scores = score_all(results, measures)
    figures = analyse(results, scores)
    trial_rows = [trial_row(trial, scores.trials.get(trial.folder, {})) for trial in results.trials]
    sentences = summarise(figures, results.num_missing, num_workers)
    sentences += [f"Damaged, and left out: {text}." for text in results.damaged]
    pictures = [
        Picture(file, caption, base64.b64encode((folder / file).read_bytes()).decode())
        for file, caption in draw_all(figures, folder).items()
    ]
    content = {
        "name": study.name,
        "sentences": sentences,
        "methods": methods_table(figures),
        "pictures": pictures,
        "pairs": pairs_table(figures.pairs),
        "level": f"{1 - 0.05 / max(1, len(figures.pairs)):.2%}",
        "answers": answers_table(figures.answers),
        "answer_pairs": answer_pairs_table(figures.answers),
        "trials": Table(list(TRIAL_HEADS.values()), [[str(row[name]) for name in TRIAL_HEADS] for row in trial_rows]),
        "commands": [command for method in figures.methods for command in method.commands],
        "source": study.path.read_text(encoding="utf-8").strip(),
    }
    write_text(folder / "trials.csv", csv_text(results.trials, trial_rows))
    write_json(
        folder / "report.json",
        {"name": study.name, "sentences": sentences, **figures.as_json(), "trials": trial_rows},
    )
    write_text(folder / "report.md", render_page("report.md.j2", content))
    write_text(folder / "report.html", render_page("report.html.j2", content))
    return "\n".join(["", *sentences, f"full report: {folder / 'report.html'}"])


def render_page(template: str, content: dict[str, Any]) -> str:
    """Return a page. In HTML every value is escaped; in Markdown the templates escape the cells of tables."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: markdown_text(text).replace("|", "\\|")
    environment.filters["text"] = markdown_text
    environment.filters["fence"] = fence
    return environment.get_template(template).render(content)


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line: without HTML, code, links and emphasis."""
    flat = visible(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(`|\](?=\())", r"\\\1", flat)


def fence(text: str) -> str:
    """Return a line of backticks longer than any in a text, to put around it."""
    return "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))


def spreadsheet_text(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula: a text that looks like one gets an apostrophe."""
    if not isinstance(value, str) or not value.lstrip().startswith(("=", "+", "-", "@")):
        return value
    return value if re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", value) else f"'{value}"


def methods_table(figures: StudyFigures) -> Table:
    """Return a row for each method, the base model first. Columns of what was not measured are left out."""
    head = ["method", "chosen point", "learning rate", "test loss [95 %]", "less base [95 %]"]
    head += ["exact match"] if figures.num_questions else []
    head += ["forgetting [95 %]"] if figures.num_other_tokens else []
    head += ["trained parameters", "size (kB)", "time (s)", "peak memory (MB)", "seeds"]
    base = ["base model", "", "", f"{figures.base.loss:.4f}", ""]
    base += [f"{figures.base.exact:.0%}"] if figures.num_questions else []
    rows = [base]
    rows += [method_row(method, figures) for method in figures.methods]
    rows += [[method.name, f"all {method.num_failed} trials failed"] for method in figures.failed_methods]
    return Table(head, [row + [""] * (len(head) - len(row)) for row in rows])


def method_row(method: MethodFigures, figures: StudyFigures) -> list[str]:
    """Return a method's cells in `methods_table`."""
    row = [
        method.name,
        params_name(method.params),
        f"{method.learning_rate:.3g}",
        with_interval(method.test),
        with_interval(method.less_base, "+"),
    ]
    row += [f"{method.exact:.0%}"] if figures.num_questions else []
    if method.forgetting_interval:
        row.append(with_interval(Estimate(method.forgetting, method.forgetting_interval), "+"))
    return [
        *row,
        f"{method.num_trained_parameters:,}",
        f"{method.num_bytes / 1e3:,.1f}",
        f"{method.seconds:.1f}",
        f"{method.memory_mb:,.0f}",
        str(len(method.seeds)),
    ]


def with_interval(estimate: Estimate, sign: str = "") -> str:
    """Return a value and its interval; sign "+": each with its sign."""
    low, high = estimate.interval
    return f"{estimate.value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def pairs_table(pairs: Sequence[PairDifference]) -> Table:
    """Return a row for each pair of methods."""
    rows = [
        [
            f"{pair.better} − {pair.worse}",
            f"{pair.value:+.4f}",
            f"[{pair.interval[0]:+.4f}, {pair.interval[1]:+.4f}]",
            "yes" if pair.clear else "no",
        ]
        for pair in pairs
    ]
    return Table(["pair", "difference of test loss", "interval", "larger than chance"], rows)


def answers_table(figures: Sequence[AnswerFigure]) -> Table:
    """Return a row for each figure of answers and each model, the base model first."""
    rows = []
    for figure in figures:
        rows.append([figure.title, BASE, with_interval(Estimate(figure.base, figure.base_interval)), ""])
        for method in figure.methods:
            value = with_interval(Estimate(method.value, method.interval))
            less_base = with_interval(Estimate(method.less_base, method.less_base_interval), "+")
            rows.append([figure.title, method.name, value, less_base])
    return Table(["figure", "method", "value [95 %]", "less base [95 %]"], rows)


def answer_pairs_table(figures: Sequence[AnswerFigure]) -> Table:
    """Return a row for each figure of answers and each pair of methods."""
    rows = [
        [
            figure.title,
            f"{pair.first} − {pair.second}",
            f"{pair.value:+.4f}",
            f"[{pair.interval[0]:+.4f}, {pair.interval[1]:+.4f}]",
            "yes" if pair.clear else "no",
        ]
        for figure in figures
        for pair in figure.pairs
    ]
    return Table(["figure", "pair", "difference", "interval", "larger than chance"], rows)


def trial_row(trial: TrialResult, scores: Scores) -> dict[str, Any]:
    """Return a trial's cells by their names in trials.csv and report.json; a failed trial has no figures."""
    summary = trial.summary
    row = {
        "method": trial.spec_name,
        "point": params_name(trial.params),
        "seed": trial.seed,
        "steps": "",
        "learning_rate": f"{trial.learning_rate:.4g}",
        "choosing_loss": "",
        "test_loss": "",
        "exact_match": "",
        "seconds": "",
        "peak_memory_mb": "",
        "failed": trial.failed or "",
    }
    if not trial.failed:
        row |= {
            "steps": summary["steps"],
            "choosing_loss": f"{trial.choosing_loss:.6f}",
            "test_loss": f"{trial.test_loss:.6f}",
            "exact_match": f"{exact_match(scores):.4f}",
            "seconds": summary["wall_seconds"],
            "peak_memory_mb": summary["peak_memory_mb"],
        }
    others = {title_of(key): score for key, score in scores.items() if key != (TEST, EXACT_MATCH)}
    return row | {title: f"{value_of(score):.4f}" for title, score in others.items()}


def csv_text(trials: Sequence[TrialResult], trial_rows: Sequence[dict[str, Any]]) -> str:
    """Return trials.csv: every trial with its figures, sizes, folder and command.

    Args:
        trials: the trials.
        trial_rows: their cells, of `trial_row`.
    """
    answer_names = list(dict.fromkeys(name for row in trial_rows for name in row if name not in TRIAL_HEADS))
    names = ("trainable_parameters", "adapter_bytes", "tokens", "base_eval_loss", "initial_eval_loss")
    rows = [
        {
            **{name: row[name] for name in TRIAL_HEADS},
            **{name: trial.summary.get(name, "") for name in names},
            "other_loss": "" if trial.failed else f"{other_loss(trial.summary):.6f}",
            "folder": trial.folder,
            "command": trial.command,
            **{name: row.get(name, "") for name in answer_names},
        }
        for trial, row in zip(trials, trial_rows, strict=True)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: spreadsheet_text(value) for name, value in row.items()} for row in rows)
    return text.getvalue()
