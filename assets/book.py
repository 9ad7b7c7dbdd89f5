"""A book of facts, and questions about it: what a model has to look up in its context.

A book says what each of some animals likes. A conversation asks for one or two of them, in one of several wordings. No
two books agree, so nothing can be known without the book. `make_lookup_model.py` pretrains on books drawn at random;
`make_book.py` writes one book with questions, for distillation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

ANIMAL_WORDS = (
    "ant ape bat bear bee bison boar camel cat cobra cow crab crane crow deer dingo dog dove duck eagle eel "
    "elk emu finch fox frog gnu goat goose hare hawk hen heron horse hyena ibex jackal koala lamb lark lion "
    "llama lynx mole moose moth mouse mule newt otter owl panda pig puma quail rabbit raven seal shark sheep "
    "skunk swan tiger toad"
)
THING_WORDS = (
    "apples bells boats books bread bricks butter cake chalk cheese clay clouds coffee coins corn cotton dust "
    "eggs figs fire flour flowers fog gold grapes grass hats honey ice ink iron jam jazz kites lace leather "
    "lemons light maps milk moss music nuts oil onions paint paper pearls pears pepper plums rain rice rope "
    "rust salt sand silk snow soap songs stars sugar wool"
)
ANIMALS, THINGS = tuple(ANIMAL_WORDS.split()), tuple(THING_WORDS.split())
ONE = (
    "what does the {} like ?",
    "tell me what the {} likes .",
    "and the {} ?",
    "which thing does the {} want most ?",
)
TWO = ("what do the {} and the {} like ?", "tell me what the {} and the {} like .", "the {} , then the {} ?")
COMMA = ","

Facts = Sequence[tuple[str, str]]


def draw_book(rng: random.Random, num_facts: int) -> list[tuple[str, str]]:
    """Return pairs of an animal and what it likes; each animal stands there once."""
    return [(animal, rng.choice(THINGS)) for animal in rng.sample(ANIMALS, num_facts)]


def text_of(facts: Facts) -> str:
    """Return facts as a text: the whole book, or an answer."""
    return f" {COMMA} ".join(f"{animal} {thing}" for animal, thing in facts)


def conversation(facts: Facts, wording: str) -> list[dict[str, str]]:
    """Return a question about one or two facts, and its answer."""
    question = wording.format(*(animal for animal, _ in facts))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text_of(facts)}]
