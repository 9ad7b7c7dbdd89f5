"""Rows of any known form → questions, each with its reference answer where the row has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, forms, reading
from open_instruct.data.bad_rows import BadRows, note
from open_instruct.data.pairs import source_ids
from open_instruct.data.reading import Row
from open_instruct.data.rendering import Rendering
from open_instruct.data.sources import source_in
from open_instruct.errors import InputError, warn


@dataclass(frozen=True)
class Question:
    """A conversation up to the turn that is to be answered."""

    source: str  # file and line of the row, for errors
    messages: list[dict[str, Any]]
    reference: str | None  # the turn itself, where the row has it
    named_source: str = ""  # in the row's column `source`

    @property
    def text(self) -> str:
        """Return the last message, for tables."""
        return str(self.messages[-1]["content"])


def questions(
    rows: Iterable[Row],
    key: str = "messages",
    bad: BadRows | None = None,
    rendering: Rendering | None = None,
    answered: bool = False,
) -> Iterator[Question]:
    """Yield one question a row: everything before the assistant's last turn if the row ends with it, else all of it.

    Args:
        rows: the rows.
        key: column of the messages.
        bad: takes the errors of single rows; None: the first one is raised.
        rendering: makes a conversation of each row's columns; None: it has a known form.
        answered: a row without an answer can't be used, where columns are named.

    Raises:
        InputError: a row of no known form, or with content that is no text; or the first one lacks a column.
    """
    is_first = True
    for source, row in rows:
        try:
            if rendering:
                (messages,) = rendering.conversations(source, row, answered and bool(rendering.columns))
            else:
                messages = forms.to_messages(source, row, key, answered=False)
        except InputError as error:
            note(None if is_first and reading.is_of_all(error, bad) else bad, error)
            continue
        is_first = False
        if bad is not None:
            bad.keep()
        if messages[-1]["role"] == "assistant":
            yield Question(source, messages[:-1], str(messages[-1]["content"]), source_in(row))
        else:
            yield Question(source, messages, None, source_in(row))


def read_questions(
    file: str, bad_rows: str = "error", answered: bool = False, rendering: Rendering | None = None
) -> list[Question]:
    """Return the questions of a file, folder or data set, in its order.

    Args:
        file: a source, as `reading.files_of` takes it.
        bad_rows: "error", or "skip": leave out the rows that can't be used, with a warning that counts them.
        answered: a row without an answer can't be used.
        rendering: see `questions`.

    Raises:
        InputError: there is no row, or one can't be used and must be.
    """
    bad = BadRows(bad_rows == "skip")
    rows = []
    read = reading.read_files(reading.files_of(file), bad)
    for question in questions(read, bad=bad, rendering=rendering, answered=answered):
        if answered and question.reference is None:
            bad.reject(
                InputError(
                    f"{question.source}: no answer to compare with: give rows that end with the assistant's turn, "
                    "or use generate_peft.py"
                )
            )
        else:
            rows.append(question)
    bad.check()
    if not rows:
        raise InputError(f"{file} holds no row: name another file")
    if bad.num_bad:
        warn(bad.summary())
    return rows


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """Return a conversation with a system message: its own, or else the given one."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def check_system(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], system: str) -> None:
    """Refuse a system message that would stand before no conversation.

    Raises:
        InputError: every row has one of its own, or the chat template refuses it or leaves it out.
    """
    without = next((row for row in rows if row.messages[0]["role"] != "system"), None)
    if without is None:
        raise InputError("--system has no effect: every row has a system message of its own; drop the flag")
    if prompt_ids(tokenizer, with_system(without.messages, system)) == prompt_ids(tokenizer, without.messages):
        raise InputError(
            f"--system has no effect: the chat template of {tokenizer.name_or_path} leaves such a message out; drop "
            "the flag, or use another with --chat_template_name"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Return the token ids of a conversation that the assistant is to continue, as in training.

    Raises:
        InputError: the chat template can't hold it, for example a system message, or two turns of one role.
    """
    if chat.makes_pairs(tokenizer):
        return source_ids(tokenizer, [messages])[0]
    (text,), _ = chat.render_texts(tokenizer, [messages], add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the chat template writes nothing for a question: use another with --chat_template_name")
    return ids
