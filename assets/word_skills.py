"""The word skills that the bundled model is pretrained on, and the conversations that show them.

A skill turns a list of words into an answer. A conversation either names the skill in an instruction or shows only the
words. `make_model.py` pretrains on both kinds; `make_data.py` writes fine-tuning rows of the second kind, so that a
soft prompt has to learn to call a skill that the base model already has.
"""

from __future__ import annotations

import random
from collections.abc import Callable

CATEGORIES = {
    "animal": [
        "horse",
        "cat",
        "dog",
        "lion",
        "tiger",
        "mouse",
        "rabbit",
        "goat",
        "sheep",
        "fox",
        "wolf",
        "bear",
        "duck",
    ],
    "fruit": [
        "apple",
        "plum",
        "cherry",
        "lemon",
        "grape",
        "melon",
        "peach",
        "banana",
        "orange",
        "mango",
        "fig",
        "kiwi",
    ],
    "tool": [
        "hammer",
        "saw",
        "drill",
        "spade",
        "rake",
        "ladder",
        "chisel",
        "wrench",
        "needle",
        "brush",
        "anvil",
        "knife",
    ],
    "place": [
        "river",
        "forest",
        "desert",
        "island",
        "valley",
        "harbour",
        "village",
        "castle",
        "garden",
        "bridge",
        "meadow",
        "quarry",
    ],
    "weather": ["rain", "snow", "wind", "storm", "fog", "thunder", "hail", "frost", "sunshine", "drizzle"],
    "clothing": ["coat", "hat", "scarf", "glove", "boot", "shirt", "jacket", "belt", "sock", "apron"],
    "music": ["violin", "drum", "flute", "piano", "guitar", "trumpet", "harp", "organ", "bell", "cello"],
}
OPPOSITE_PAIRS = (
    "hot cold, big small, fast slow, hard soft, wet dry, light dark, old young, rich poor, high low, near far, "
    "early late, loud quiet, full empty, open closed, wide narrow, thick thin, "
    "sweet sour, sharp blunt, clean dirty, brave timid"
)
OPPOSITES: dict[str, str] = {}
for pair in OPPOSITE_PAIRS.split(", "):
    left, right = pair.split()
    OPPOSITES[left], OPPOSITES[right] = right, left
CATEGORY_OF = {word: category for category, words in CATEGORIES.items() for word in words}
NOUNS = sorted(CATEGORY_OF)
ADJECTIVES = sorted(OPPOSITES)

SKILLS: dict[str, Callable[[list[str]], str]] = {
    "repeat": lambda words: " ".join(words),
    "reverse": lambda words: " ".join(reversed(words)),
    "sort": lambda words: " ".join(sorted(words)),
    "first": lambda words: words[0],
    "last": lambda words: words[-1],
    "count": lambda words: str(len(words)),
    "rotate": lambda words: " ".join([*words[1:], words[0]]),
    "double": lambda words: " ".join(f"{word} {word}" for word in words),
    "opposites": lambda words: " ".join(OPPOSITES[word] for word in words),
    "categories": lambda words: " ".join(CATEGORY_OF[word] for word in words),
}
INSTRUCTIONS = {
    "repeat": ["Repeat these words.", "Copy the list.", "Say the same words again.", "Write the list as it is."],
    "reverse": [
        "Reverse the list.",
        "Write the words backwards.",
        "Put the words in reverse order.",
        "Start from the end.",
    ],
    "sort": [
        "Sort the words.",
        "Put the words in alphabetical order.",
        "Order the list from A to Z.",
        "Sort the list by letter.",
    ],
    "first": [
        "Which word is first?",
        "Name the first word.",
        "Give only the first word.",
        "What does the list start with?",
    ],
    "last": ["Which word is last?", "Name the last word.", "Give only the last word.", "What does the list end with?"],
    "count": ["How many words are there?", "Count the words.", "Give the number of words.", "How long is the list?"],
    "rotate": [
        "Move the first word to the end.",
        "Rotate the list by one.",
        "Put the first word last.",
        "Shift the words left.",
    ],
    "double": [
        "Write each word twice.",
        "Double each word.",
        "Say every word two times.",
        "Repeat each word once more.",
    ],
    "opposites": [
        "Give the opposite of each word.",
        "Write the opposites.",
        "Say the contrary.",
        "Turn each word around in meaning.",
    ],
    "categories": [
        "What kind of thing is each?",
        "Name the category of each word.",
        "Classify the words.",
        "Give the kinds.",
    ],
}
MIN_WORDS, MAX_WORDS = 3, 6


def draw_words(rng: random.Random, skill: str | None = None) -> list[str]:
    """Draw three to six different words that a skill can be applied to (None: nouns, adjectives, or a mixture)."""
    pool = {"opposites": ADJECTIVES, "categories": NOUNS}.get(skill or "") or rng.choice(
        [NOUNS, ADJECTIVES, NOUNS + ADJECTIVES]
    )
    return rng.sample(pool, rng.randint(MIN_WORDS, MAX_WORDS))


def unnamed_conversation(rng: random.Random, skill: str, num_turns: int = 1) -> list[dict[str, str]]:
    """Draw a conversation whose user turns are bare word lists; every answer applies `skill`."""
    messages = []
    for _ in range(num_turns):
        words = draw_words(rng, skill)
        messages += [
            {"role": "user", "content": " ".join(words)},
            {"role": "assistant", "content": SKILLS[skill](words)},
        ]
    return messages


def named_conversation(rng: random.Random, skill: str) -> list[dict[str, str]]:
    """Draw a conversation that names the skill: before the words, after them, or in a system message."""
    instruction = rng.choice(INSTRUCTIONS[skill])
    form = rng.choice(["before", "before line", "after", "system"])
    messages = unnamed_conversation(rng, skill, num_turns=rng.choice([1, 1, 2]) if form == "system" else 1)
    if form == "system":
        return [{"role": "system", "content": instruction}, *messages]
    words = messages[0]["content"]
    pattern = {
        "before": f"{instruction} {words}",
        "before line": f"{instruction}\n{words}",
        "after": f"{words}\n{instruction}",
    }
    messages[0]["content"] = pattern[form]
    return messages


def pretraining_conversation(rng: random.Random) -> list[dict[str, str]]:
    """Draw a conversation of a random skill.

    Eight in ten name the skill. In the others only a second or third turn shows which skill it is.
    """
    skill = rng.choice(list(SKILLS))
    if rng.random() < 0.8:
        return named_conversation(rng, skill)
    return unnamed_conversation(rng, skill, num_turns=rng.choice([1, 1, 2, 3]))
