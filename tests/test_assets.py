"""The bundled sample and model are what their programs say."""

import json

from assets.make_data import rows
from assets.word_skills import SKILLS
from tests.conftest import ROOT, TINY_MODEL


def test_the_sample_is_what_its_program_writes():
    sample = ROOT / "data" / "sample"
    train, held_out = (
        [json.loads(line) for line in (sample / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert train + held_out == rows("reverse", 2600, seed=7)
    assert len(held_out) == 200


def test_no_held_out_question_is_trained_on():
    sample = ROOT / "data" / "sample"
    train, held_out = (
        {json.loads(line)["messages"][0]["content"] for line in (sample / name).read_text().splitlines()}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert not train & held_out


def test_the_skills_do_what_they_are_called():
    words = ["wolf", "fig", "hammer"]
    answers = {name: SKILLS[name](words) for name in SKILLS if name != "opposites"}
    assert answers == {
        "repeat": "wolf fig hammer",
        "reverse": "hammer fig wolf",
        "sort": "fig hammer wolf",
        "first": "wolf",
        "last": "hammer",
        "count": "3",
        "rotate": "fig hammer wolf",
        "double": "wolf wolf fig fig hammer hammer",
        "categories": "animal fruit tool",
    }
    assert SKILLS["opposites"](["hot", "near"]) == "cold far"


def test_the_bundled_model_is_small_and_has_the_skills_only_when_they_are_named():
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir()) < 8e6
    skills = json.loads((TINY_MODEL / "pretraining.json").read_text())["exact_match"]
    assert skills["reverse"]["named"] > 0.9
    assert skills["reverse"]["unnamed"] < 0.3
