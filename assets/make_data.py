"""Write the bundled sample: conversations that show a skill of the bundled model without naming it.

Run from the repository root: python -m assets.make_data [--skill reverse] [--output_dir data/sample]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from assets.word_skills import SKILLS, named_conversation, unnamed_conversation


def rows(skill: str, count: int, seed: int) -> list[dict[str, object]]:
    """`count` rows in the Tulu schema whose questions are all different."""
    rng = random.Random(seed)
    found: dict[str, dict[str, object]] = {}
    while len(found) < count:
        messages = unnamed_conversation(rng, skill)
        question = messages[0]["content"]
        if question not in found:
            found[question] = {"id": f"{skill}_{len(found)}", "messages": messages, "source": f"word_skills/{skill}"}
    return list(found.values())


def other_skills(skill: str, count: int, seed: int) -> list[dict[str, object]]:
    """Conversations that name a skill other than the one trained on: what an adapter may forget."""
    rng = random.Random(seed + 1)
    names = [name for name in SKILLS if name != skill]
    return [
        {
            "id": f"other_{n}",
            "messages": named_conversation(rng, names[n % len(names)]),
            "source": f"word_skills/{names[n % len(names)]}",
        }
        for n in range(count)
    ]


def write(path: Path, chosen: list[dict[str, object]]) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")


def main() -> None:
    """Write train.jsonl and heldout.jsonl, in which no question stands twice, and other_skills.jsonl."""
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
