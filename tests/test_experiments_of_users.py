"""The commands of docs/experiments-of-users.md run as they stand there, in their order, with few steps and rows."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from assets.make_dialogues import NUM_HELDOUT, NUM_TRAIN, dialogues
from open_instruct import evaluate_peft, finetune_peft, generate_peft
from tests.conftest import ROOT

TOOLS = {tool.__name__.split(".")[-1]: tool.main for tool in (finetune_peft, generate_peft, evaluate_peft)}
PAGE = (ROOT / "docs" / "experiments-of-users.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
COMMAND = re.compile(r"^    python open_instruct/(\w+)\.py ((?:.*\\\n)*.*)", re.MULTILINE)
KEPT = {"train": 60, "heldout": 6, "other_skills": 100}  # rows of each file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the beginnings of the bundled data, in which the commands run."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "assets").symlink_to(ROOT / "assets")
    for name in ("sample", "dialogues"):
        shutil.copytree(ROOT / "data" / name, folder / "data" / name)
        for path in (folder / "data" / name).glob("*.jsonl"):
            path.write_text("".join(path.read_text().splitlines(keepends=True)[: KEPT[path.stem]]))
    return folder


def commands_of(section: str) -> list[tuple[str, list[str]]]:
    """The commands of a section, with few steps and rows."""
    found = []
    for tool, text in COMMAND.findall(section):
        words = shlex.split(text.replace("\\\n", " "))
        words = ["2" if word == "200" else "30" if word == "400" else word for word in words]
        few = ["--num_sample_answers", "0"] if tool == "finetune_peft" else []
        found.append((tool, [*words, *few]))
    return found


def test_every_command_of_the_page_is_found():
    assert len(COMMAND.findall(PAGE)) == PAGE.count("    python ") == 23
    assert set(SECTIONS) == set(CHECKS)


def figures(folder: Path, name: str) -> dict:
    return json.loads((folder / "output" / name / "evaluation.json").read_text())["figures"]


def losses_differ(folder: Path) -> None:
    measured = figures(folder, "labels")
    assert len({measured[name]["loss"]["value"] for name in ("base", "completions", "full-text")}) == 3


def concatenated_has_the_best_recall(folder: Path) -> None:
    (measured,) = figures(folder, "five").values()
    values = {name: figure["value"] for name, figure in measured.items()}
    assert values["rouge1_recall concatenate"] >= values["rouge1_recall best"] - 1e-9 >= values["rouge1_recall"] - 2e-9
    assert {"pass@1", "pass@5"} <= set(values)


def three_models_have_rouge(folder: Path) -> None:
    measured = figures(folder, "rouge")
    assert set(measured) == {"base", "full", "lora"}
    assert all({"rougeLsum", "rouge1_precision", "rouge1_recall"} <= set(values) for values in measured.values())


def three_mixtures_differ(folder: Path) -> None:
    measured = figures(folder, "mixtures")
    assert len({measured[f"mixed-{share}"]["loss"]["value"] for share in (10, 30, 100)}) == 3


def both_stand_behind_the_hard_prompt(folder: Path) -> None:
    measured = json.loads((folder / "output" / "before-hard-measured" / "evaluation.json").read_text())
    assert set(measured["hard_prompt_tokens"]) == {"base", "before-hard"}
    assert measured["figures"]["base"]["loss"]["value"] != figures(folder, "mixtures")["base"]["loss"]["value"]
    summary = json.loads((folder / "output" / "before-hard" / "summary.json").read_text())
    assert len(summary["by_source"]) > 1


def templates_help_the_base(folder: Path) -> None:
    rouge = {name: figures(folder, f"base-{name}")["base"]["rouge1"]["value"] for name in ("plain", "named", "shots")}
    assert rouge["plain"] < 0.8 and rouge["named"] == rouge["shots"] == 1
    trained = {
        name: json.loads((folder / "output" / name / "run.json").read_text())["rendering"]
        for name in ("plain", "named")
    }
    assert len(trained["named"]["templates"]) == 2 and not trained["plain"]["templates"]
    assert figures(folder, "named-measured")["base"] == figures(folder, "base-named")["base"]


CHECKS = {
    "Full text against completions": losses_differ,
    "Several answers, concatenated and scored against one": concatenated_has_the_best_recall,
    "Base, full fine-tuning and PEFT, by ROUGE": three_models_have_rouge,
    "Three mixtures": three_mixtures_differ,
    "One soft prompt for two data sets, before a hard prompt with exemplars": both_stand_behind_the_hard_prompt,
    "Templates on dialogue summaries": templates_help_the_base,
}


def test_the_experiments_run(folder, monkeypatch, capsys):
    """All in one test: later ones use adapters of earlier ones."""
    monkeypatch.chdir(folder)
    for title, section in SECTIONS.items():
        for tool, words in commands_of(section):
            AcceleratorState._reset_state(reset_partial_state=True)
            assert TOOLS[tool](words) == 0, (words, capsys.readouterr().err)
        CHECKS[title](folder)


def test_the_dialogues_are_what_their_program_writes():
    rows = dialogues(NUM_TRAIN + NUM_HELDOUT)
    for name, part in (("train", rows[:NUM_TRAIN]), ("heldout", rows[NUM_TRAIN:])):
        lines = (ROOT / "data" / "dialogues" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == part
