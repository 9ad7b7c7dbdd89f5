"""Self-study: a model writes questions about a text, and answers them behind it, for an adapter to be distilled from.

Each conversation draws a piece of the text and a kind of question. The model reads the piece and writes a question, or
the kind has one already; then the model answers it behind the whole text. After Eyuboglu et al. 2025 (2506.06266).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from open_instruct.adapters.folders import BASE
from open_instruct.adapters.generation import Sampling
from open_instruct.adapters.served import Served
from open_instruct.data.context import Context, context_of
from open_instruct.data.questions import prompt_ids
from open_instruct.errors import InputError, visible
from open_instruct.small_files import read_yaml

KINDS = Path(__file__).with_name("self_study.yaml")
PARTS = ("ask", "question")
QUESTION_TOKENS = 128  # of a question that the model writes


@dataclass(frozen=True)
class Kind:
    """A kind of question: what asks the model to write one, or the question itself."""

    name: str
    is_asked: bool  # the model is asked for the question
    text: str


@dataclass(frozen=True)
class Draw:
    """What a conversation is about."""

    kind: Kind
    piece: str
    text: str  # of the kind, filled in
    seed: int


@dataclass(frozen=True)
class Written:
    """How many conversations were written, how many left out, and how many answered behind their piece alone."""

    written: int
    empty: int
    behind_piece: int


def read_kinds(path: str | None) -> list[Kind]:
    """Return the kinds of questions in a YAML file.

    Args:
        path: the file; None: the one that comes with this module.

    Raises:
        InputError: it can't be read, or has no such kinds.
    """
    what = f"--self_study_prompts {path or KINDS}"
    kinds = []
    for name, content in read_yaml(Path(path or KINDS), what).items():
        parts = list(content.items()) if isinstance(content, dict) else []
        if len(parts) != 1 or parts[0][0] not in PARTS or not isinstance(parts[0][1], str) or not parts[0][1].strip():
            raise InputError(f"{what}: kind {visible(name)[:40]} must have a text under `ask` or under `question`")
        kinds.append(Kind(name, parts[0][0] == "ask", parts[0][1].strip()))
    if not kinds:
        raise InputError(f"{what} has no kind of question: add one")
    return kinds


class Pieces:
    """A text that is cut anywhere into pieces of some number of tokens."""

    def __init__(self, text: str, tokenizer: Any, length: int) -> None:
        """Tokenise the text; `length` is the tokens of a piece."""
        self.text, self.length = text, length
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.bounds: list[tuple[int, int]] = encoded["offset_mapping"]

    def draw(self, rng: random.Random) -> str:
        """Return a piece that begins and ends with a word."""
        first = rng.randint(0, max(0, len(self.bounds) - self.length))
        last = min(first + self.length, len(self.bounds)) - 1
        start, end = self.bounds[first][0], self.bounds[last][1]
        while start > 0 and not self.text[start - 1].isspace() and not self.text[start].isspace() and start < end - 1:
            start += 1
        return self.text[start:end].strip() or self.text.strip()


def draw_subject(number: int, pieces: Pieces, kinds: Sequence[Kind], seed: int) -> Draw:
    """Return what conversation `number` is about: it follows from number and seed alone."""
    rng = random.Random(f"{seed} {number}")
    kind, piece = rng.choice(kinds), pieces.draw(rng)
    quotes = [quote.strip() for quote in re.split(r"(?<=[.!?;])\s+|\n+", piece) if quote.strip()] or [piece]
    words = re.findall(r"\w[\w'-]*", piece) or [piece]
    filled = re.sub(r"\{(quote|word)\}", lambda name: rng.choice(quotes if name[1] == "quote" else words), kind.text)
    return Draw(kind, piece, filled, rng.getrandbits(31))


def next_number(path: Path) -> int:
    """Return the number of the conversation after the last one in an output file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["number"]) + 1 if lines else 0


def write_conversations(
    served: Served,
    text: str,
    kinds: Sequence[Kind],
    count: int,
    path: Path,
    sampling: Sampling,
    batch_size: int,
    piece_tokens: int,
) -> Written:
    """Write conversations about a text, a few batches at a time; those that a former run wrote stay.

    Args:
        served: a base, or a base with one adapter.
        text: the text.
        kinds: of questions.
        count: conversations in all, those included that are there already or come out empty.
        path: the output file.
        sampling: how answers are drawn. Questions are always drawn at random.
        batch_size: most answers computed at once.
        piece_tokens: tokens of a piece.

    Raises:
        InputError: not even a piece fits the model.
    """
    name = [*served.names, BASE][0]
    size = (64 if served.engine else 4) * batch_size
    max_length, whole = served.max_length(name), context_of(text, served.tokenizer)
    asking = replace(sampling, do_sample=True, max_new_tokens=QUESTION_TOKENS)
    if max_length:  # of a piece, so that what asks about it fits, too
        piece_tokens = min(piece_tokens, max_length // 2)
    pieces, start = Pieces(text, served.tokenizer, piece_tokens), next_number(path)
    empty = behind_piece = written = 0
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=count, initial=start, unit="conversation", disable=None) as bar,
    ):
        for first in range(start, count, size):
            draws = [
                draw_subject(number, pieces, kinds, sampling.seed) for number in range(first, min(first + size, count))
            ]
            seeds = [one.seed for one in draws]
            questions = [one.text for one in draws]
            asked = [i for i, one in enumerate(draws) if one.kind.is_asked]
            prompts = [prompt(served, context_of(draws[i].piece, served.tokenizer), questions[i]) for i in asked]
            found = dict(served.stream(prompts, name, asking, batch_size, seeds=[seeds[i] for i in asked]))
            for number, i in enumerate(asked):
                questions[i] = found[number][0]
            prompts = []
            for one, question in zip(draws, questions, strict=True):
                ids = prompt(served, whole, question or "?")
                if max_length and len(ids) + min(sampling.max_new_tokens, QUESTION_TOKENS) > max_length:
                    behind_piece += 1
                    ids = prompt(served, context_of(one.piece, served.tokenizer), question or "?")
                prompts.append(ids)
            answers = dict(served.stream(prompts, name, sampling, batch_size, seeds=seeds))
            for i, (one, question) in enumerate(zip(draws, questions, strict=True)):
                answer = answers[i][0]
                if not question or not answer:
                    empty += 1
                    continue
                written += 1
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = {"number": first + i, "kind": one.kind.name, "messages": messages}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(draws))
    return Written(written, empty, behind_piece)


def prompt(served: Served, context: Context, question: str) -> list[int]:
    """Return the ids of a question behind a context."""
    ids, _ = context.before(prompt_ids(served.tokenizer, [{"role": "user", "content": question}]))
    return ids
