"""Write the bundled sample: conversations that show a skill of the bundled model without naming it.

Run from the repository root: python -m assets.make_data [--skill reverse] [--output_dir data/sample]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from assets.word_skills import SKILLS, named_conversation, unnamed_conversation


def rows(skill: str, num_rows: int, seed: int) -> list[dict[str, object]]:
    """Return `num_rows` rows in the Tulu schema whose questions are all different."""
    rng = random.Random(seed)
    row_of_question: dict[str, dict[str, object]] = {}
    while len(row_of_question) < num_rows:
        messages = unnamed_conversation(rng, skill)
        question = messages[0]["content"]
        if question not in row_of_question:
            row_of_question[question] = {
                "id": f"{skill}_{len(row_of_question)}",
                "messages": messages,
                "source": f"word_skills/{skill}",
            }
    return list(row_of_question.values())


def other_skills(skill: str, num_rows: int, seed: int) -> list[dict[str, object]]:
    """Return conversations that name a skill other than the one trained on, which an adapter may forget."""
    rng = random.Random(seed + 1)
    names = [name for name in SKILLS if name != skill]
    return [
        {
            "id": f"other_{n}",
            "messages": named_conversation(rng, names[n % len(names)]),
            "source": f"word_skills/{names[n % len(names)]}",
        }
        for n in range(num_rows)
    ]


def write(path: Path, conversations: list[dict[str, object]]) -> None:
    """Write rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations), encoding="utf-8")


def main() -> None:
    """Write train.jsonl and heldout.jsonl, which share no question, and other_skills.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skill", choices=sorted(SKILLS), default="reverse")
    parser.add_argument("--num_train", type=int, default=2400)
    parser.add_argument("--num_heldout", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output_dir", type=Path, default=Path("data/sample"))
    arguments = parser.parse_args()
    drawn = rows(arguments.skill, arguments.num_train + arguments.num_heldout, arguments.seed)
    write(arguments.output_dir / "train.jsonl", drawn[: arguments.num_train])
    write(arguments.output_dir / "heldout.jsonl", drawn[arguments.num_train :])
    write(arguments.output_dir / "other_skills.jsonl", other_skills(arguments.skill, 100, arguments.seed))


if __name__ == "__main__":
    main()
