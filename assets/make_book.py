"""Write a book of facts and questions about it into data/book.

Run from the repository root: python -m assets.make_book

book.txt is the context. train.jsonl asks about it in some wordings, for one fact or two at a time, up to four times in
a conversation. heldout.jsonl asks for every fact alone and in pairs, in wordings that training never uses.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from assets.book import ONE, TWO, conversation, draw_book, text_of

FOLDER = Path("data/book")
NUM_FACTS = 48
NUM_TRAINED = 1000
MOST_TURNS = 4  # questions of a conversation
SEED = 7
TRAINED_ONE, UNSEEN_ONE = ONE[:2], ONE[2:]
TRAINED_TWO, UNSEEN_TWO = TWO[:2], TWO[2:]


def rows(rng: random.Random, facts: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the conversations of training."""
    for number in range(NUM_TRAINED):
        messages = []
        for _ in range(rng.randint(1, MOST_TURNS)):
            asked = rng.sample(facts, rng.choice((1, 2)))
            messages += conversation(asked, rng.choice(TRAINED_ONE if len(asked) == 1 else TRAINED_TWO))
        yield {"id": f"book_{number}", "messages": messages, "source": "book"}


def unseen_rows(rng: random.Random, facts: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the held-out questions: each fact alone, and beside another."""
    for number, fact in enumerate(facts):
        yield {"id": f"one_{number}", "messages": conversation([fact], rng.choice(UNSEEN_ONE)), "source": "book"}
    for number, fact in enumerate(facts):
        other = rng.choice([pair for pair in facts if pair != fact])
        asked = conversation([fact, other], rng.choice(UNSEEN_TWO))
        yield {"id": f"two_{number}", "messages": asked, "source": "book"}


def main() -> None:
    """Write the three files."""
    rng = random.Random(SEED)
    facts = draw_book(rng, NUM_FACTS)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "book.txt").write_text(text_of(facts) + "\n")
    for name, made in (("train", rows(rng, facts)), ("heldout", unseen_rows(rng, facts))):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


if __name__ == "__main__":
    main()
