"""Write rows with the columns of Dialogsum and SAMSum, for a model that knows lists of words.

Run from the repository root: python -m assets.make_dialogues [--output_dir data/dialogues]

A "dialogue" is a list of words, and its "summary" says what kind of thing each of them is: a skill of the bundled model
that a template may name. No answer stands in the question.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from assets.make_data import write
from assets.word_skills import SKILLS, draw_words

SEED, NUM_TRAIN, NUM_HELDOUT, SKILL = 11, 300, 60, "categories"


def dialogues(num_rows: int, seed: int = SEED) -> list[dict[str, object]]:
    """Return rows whose dialogues are all different."""
    rng, made = random.Random(seed), dict[str, dict[str, object]]()
    while len(made) < num_rows:
        words = draw_words(rng, SKILL)
        row = {"id": f"dialogue_{len(made)}", "dialogue": " ".join(words), "summary": SKILLS[SKILL](words)}
        made.setdefault(" ".join(words), row)
    return list(made.values())


def main() -> None:
    """Write train.jsonl and heldout.jsonl, which share no dialogue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("data/dialogues"))
    folder = parser.parse_args().output_dir
    rows = dialogues(NUM_TRAIN + NUM_HELDOUT)
    write(folder / "train.jsonl", rows[:NUM_TRAIN])
    write(folder / "heldout.jsonl", rows[NUM_TRAIN:])


if __name__ == "__main__":
    main()
