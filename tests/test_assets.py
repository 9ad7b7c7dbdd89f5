"""The bundled sample and model are what their programs say."""

import json
import random

import open_instruct
from assets import make_book
from assets.book import ONE, TWO, conversation, draw_book, text_of
from assets.make_data import rows
from assets.word_skills import SKILLS
from tests.conftest import ROOT, TINY_MODEL, TINY_T5


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


def test_the_bundled_t5_is_small_and_has_the_skills_only_when_they_are_named():
    assert sum(path.stat().st_size for path in TINY_T5.iterdir()) < 8e6
    skills = json.loads((TINY_T5 / "pretraining.json").read_text())["exact_match"]
    assert skills["reverse"]["named"] > 0.9
    assert skills["reverse"]["unnamed"] < 0.3


def test_the_book_is_what_its_program_writes():
    rng = random.Random(make_book.SEED)
    facts = draw_book(rng, make_book.NUM_FACTS)
    files = {
        "book.txt": text_of(facts) + "\n",
        "train.jsonl": "".join(json.dumps(row) + "\n" for row in make_book.rows(rng, facts)),
        "heldout.jsonl": "".join(json.dumps(row) + "\n" for row in make_book.unseen_rows(rng, facts)),
    }
    assert {name: (ROOT / "data" / "book" / name).read_text() for name in files} == files


def test_the_lookup_model_looks_facts_up():
    """Behind its book it answers every question; behind another book it answers from that."""
    served = open_instruct.load(model_name_or_path=str(ROOT / "assets" / "lookup-model"))
    facts = draw_book(random.Random("another"), 40)
    chats = [
        [{"role": "system", "content": text_of(facts)}, conversation(facts[i : i + 1 + i % 2], wording)[0]]
        for i, wording in enumerate([ONE[0], TWO[1], ONE[2], TWO[2], ONE[3]])
    ]
    answers = [texts[0] for texts in served.answers(chats, sampling=open_instruct.Sampling(12))]
    assert answers == [text_of(facts[i : i + 1 + i % 2]) for i in range(5)]
