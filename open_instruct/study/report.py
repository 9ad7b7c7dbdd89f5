"""A study's report: one self-contained page, Markdown, CSV, JSON and pictures."""

from __future__ import annotations

import base64
import csv
import html
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_instruct.files import AtomicFile, write_json
from open_instruct.study import plots as study_plots
from open_instruct.study import sentences as study_words
from open_instruct.study.figures import Done, analyse, exact, loss, other_loss, point_name

Block = tuple[
    Any, ...
]  # ("heading", text), ("text", text), ("list", texts), ("table", head, rows), ("image", file, caption), ("code", text)

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}figcaption{font-size:14px;color:#555}
pre{background:#f4f4f4;padding:.8em;overflow-x:auto;font-size:13px}h1,h2{line-height:1.2}"""


def command(words: Sequence[str]) -> str:
    """What reproduces a trial."""
    return "python open_instruct/finetune_peft.py " + shlex.join(words)


def write(
    folder: Path, name: str, source: str, done: Sequence[Done], bases: dict[str, Any], missing: int, workers: int
) -> str:
    """Write report.html, report.md, trials.csv, report.json and pictures.

    Args:
        folder: of the study.
        name: of the study.
        source: its file's text.
        done: finished trials.
        bases: figures of the base that each method started from.
        missing: trials that have not run.
        workers: trials that ran at a time.

    Returns:
        The summary for the terminal.
    """
    figures = analyse(done, bases)
    sentences = study_words.sentences(figures, missing, workers)
    captions = study_plots.draw_all(figures, folder)
    blocks = page(name, source, figures, sentences, captions, done)
    replace_text(folder / "trials.csv", csv_text(done))
    write_json(
        folder / "report.json",
        {"name": name, "sentences": sentences, **figures, "trials": [trial_row(one) for one in done]},
    )
    replace_text(folder / "report.md", markdown(blocks))
    replace_text(folder / "report.html", html_page(name, blocks, folder))
    return "\n".join(["", *sentences, f"the whole report: {folder / 'report.html'}"])


def replace_text(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, never half."""
    with AtomicFile(path) as file:
        file.write(text.encode())


def page(
    name: str,
    source: str,
    figures: dict[str, Any],
    sentences: list[str],
    captions: dict[str, str],
    done: Sequence[Done],
) -> list[Block]:
    """The report's content, in the order in which it is read."""
    blocks: list[Block] = [
        ("heading", 1, f"Study: {name}"),
        ("list", sentences),
        ("heading", 2, "Methods at their chosen points"),
    ]
    blocks.append(("table", *methods_table(figures)))
    images = [("image", file, caption) for file, caption in captions.items()]
    blocks += [*images, ("heading", 2, "Are the differences larger than chance?")]
    blocks.append(("text", pairs_text(figures)))
    rows = [
        [
            f"{pair['better']} − {pair['worse']}",
            f"{pair['value']:+.4f}",
            f"[{pair['interval'][0]:+.4f}, {pair['interval'][1]:+.4f}]",
            "yes" if pair["clear"] else "no",
        ]
        for pair in figures["pairs"]
    ]
    if rows:
        blocks.append(("table", ["pair", "difference of test loss", "interval", "larger than chance"], rows))
    blocks += [
        ("heading", 2, "Every trial"),
        ("table", TRIAL_COLUMNS, [[str(v) for v in trial_row(one).values()] for one in done]),
    ]
    blocks += [
        ("heading", 2, "Reproduce"),
        ("text", "Each command repeats a trial at its method's chosen point, from the repository's root."),
    ]
    for method in figures["methods"]:
        for line in method.get("commands", []):
            blocks.append(("code", line))
    blocks += [("text", "All trials' commands are in trials.csv. The study itself:"), ("code", source.strip())]
    return blocks


def pairs_text(figures: dict[str, Any]) -> str:
    """How the intervals were made."""
    number = max(1, len(figures["pairs"]))
    return (
        "Differences are paired: the same test rows and the same seeds on both sides, resampled together. The intervals hold all "
        f"together at 95 % (each at {1 - 0.05 / number:.2%}, Bonferroni)."
    )


def methods_table(figures: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row for each method, the base first."""
    base = figures["base"]
    head = ["method", "chosen point", "learning rate", "test loss [95 %]", "less base [95 %]"]
    head += ["exact match"] if figures["questions"] else []
    head += ["forgetting"] if figures["other_tokens"] else []
    head += ["trained parameters", "size (kB)", "time (s)", "peak memory (MB)", "seeds"]
    first = ["base model", "", "", f"{base['loss']:.4f}", ""]
    first += [f"{base['exact']:.0%}"] if figures["questions"] else []
    rows = [first + [""] * (len(head) - len(first))]
    for m in figures["methods"]:
        if not m["works"]:
            rows.append([m["name"], f"all {m['failed']} trials failed", *[""] * (len(head) - 2)])
            continue
        row = [
            m["name"],
            point_name(m["point"]),
            f"{m['learning_rate']:.3g}",
            bounded(m["test"]),
            bounded(m["less_base"], "+"),
        ]
        row += [f"{m['exact']:.0%}"] if figures["questions"] else []
        row += [f"{m['forgetting']:+.4f}"] if figures["other_tokens"] else []
        row += [
            f"{m['trained']:,}",
            f"{m['bytes'] / 1e3:,.1f}",
            f"{m['seconds']:.1f}",
            f"{m['memory_mb']:,.0f}",
            str(len(m["seeds"])),
        ]
        rows.append(row)
    return head, rows


def bounded(figure: dict[str, Any], sign: str = "") -> str:
    """A value and its interval."""
    low, high = figure["interval"]
    return f"{figure['value']:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


TRIAL_COLUMNS = [
    "method",
    "point",
    "seed",
    "steps",
    "learning rate",
    "loss for choosing",
    "test loss",
    "exact match",
    "s",
    "MB",
    "failed",
]


def trial_row(one: Done) -> dict[str, Any]:
    """A trial in one line."""
    s = one.summary
    good = not one.failed
    return {
        "method": one.entry,
        "point": point_name(one.point),
        "seed": one.seed,
        "steps": s["steps"] if good else "",
        "learning_rate": f"{one.learning_rate:.4g}",
        "choosing_loss": f"{loss(s, 'choosing'):.6f}" if good else "",
        "test_loss": f"{loss(s, 'test'):.6f}" if good else "",
        "exact_match": f"{exact(s):.4f}" if good else "",
        "seconds": s["wall_seconds"] if good else "",
        "peak_memory_mb": s["peak_memory_mb"] if good else "",
        "failed": one.failed or "",
    }


def csv_text(done: Sequence[Done]) -> str:
    """Every trial with its parameters, sizes and command."""
    out = io.StringIO()
    rows = []
    for one in done:
        s = one.summary
        more = {
            name: s.get(name, "")
            for name in ("trainable_parameters", "adapter_bytes", "tokens", "base_eval_loss", "initial_eval_loss")
        }
        other = "" if one.failed else f"{other_loss(s):.6f}"
        rows.append({**trial_row(one), **more, "other_loss": other, "folder": one.folder, "command": one.command})
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown, with its pictures beside it."""
    lines = []
    for kind, *parts in blocks:
        if kind == "heading":
            lines.append("#" * parts[0] + " " + parts[1])
        elif kind == "list":
            lines.append("\n".join(f"- {text}" for text in parts[0]))
        elif kind == "table":
            rows = [parts[0], ["---"] * len(parts[0]), *parts[1]]
            lines.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows))
        elif kind == "image":
            lines.append(f"![{parts[1]}]({parts[0]})\n\n{parts[1]}.")
        elif kind == "code":
            lines.append(f"```\n{parts[0]}\n```")
        else:
            lines.append(parts[0])
    return "\n\n".join(lines) + "\n"


def html_page(name: str, blocks: Sequence[Block], folder: Path) -> str:
    """The report as one page that needs nothing else: no script, no network, pictures inside."""
    body = []
    for kind, *parts in blocks:
        if kind == "heading":
            body.append(f"<h{parts[0]}>{html.escape(parts[1])}</h{parts[0]}>")
        elif kind == "list":
            body.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in parts[0]) + "</ul>")
        elif kind == "table":
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in parts[0])
            rows = "".join(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in parts[1]
            )
            body.append(f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
        elif kind == "image":
            content = base64.b64encode((folder / parts[0]).read_bytes()).decode()
            caption = html.escape(parts[1])
            picture = f'<img src="data:image/png;base64,{content}" alt="{caption}">'
            body.append(f"<figure>{picture}<figcaption>{caption}.</figcaption></figure>")
        else:
            tag = "pre" if kind == "code" else "p"
            body.append(f"<{tag}>{html.escape(parts[0])}</{tag}>")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )
