"""Rows of any known form → questions, each with its reference answer where the row has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, forms, reading
from open_instruct.data.bad_rows import BadRows, note
from open_instruct.data.pairs import source_ids
from open_instruct.data.reading import Row
from open_instruct.data.rendering import Rendering
from open_instruct.data.sources import Conversation, source_in, with_messages
from open_instruct.data.tokenising import NO_LIMIT
from open_instruct.data.tools import has_calls
from open_instruct.data.unwritten import Unwritten, unwritten
from open_instruct.errors import InputError, warn


@dataclass(frozen=True)
class Question:
    """A conversation up to the turn that is to be answered."""

    source: str  # file and line of the row, for errors
    messages: Conversation
    reference: str | None  # text of the turn itself, where the row has it
    turn: dict[str, Any] | None = None  # the same as a message

    @property
    def named_source(self) -> str:
        """Return the text in the row's column `source`."""
        return self.messages.source

    @property
    def text(self) -> str:
        """Return the last message, for tables."""
        return str(self.messages[-1]["content"] or "")

    @property
    def answered(self) -> Conversation:
        """Return the conversation with the turn.

        Raises:
            InputError: the row has none.
        """
        if self.turn is None:
            raise InputError(f"{self.source}: no answer: give rows that end with the assistant's turn")
        return with_messages(self.messages, [*self.messages, self.turn])


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
            conversation = Conversation(messages, source_in(row), reading.offered_tools(source, row, rendering))
        except InputError as error:
            note(None if is_first and reading.is_of_all(error, bad) else bad, error)
            continue
        is_first = False
        if bad is not None:
            bad.keep()
        last = conversation[-1]
        if last["role"] == "assistant":
            yield Question(source, conversation[:-1], str(last["content"] or ""), last)
        else:
            yield Question(source, conversation, None)


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


def key_of(messages: Conversation) -> Any:
    """Return what tells a question from others, as JSON: its messages, and the tools that it offers, if any."""
    return [messages, messages.tools] if messages.tools else messages


def with_calls_written(rows: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return questions whose references hold their calls of tools, as the chat template writes them.

    A warning says where the template writes no tools, or no calls.

    Raises:
        InputError: the template can't hold a conversation.
    """
    counts, written = Unwritten(), []
    for question in rows:
        try:
            counts.add(unwritten(tokenizer, [question.answered if question.turn else question.messages]))
            if question.turn and has_calls(question.turn):
                (ids,), (spans,) = chat.tokenize(tokenizer, [question.answered], NO_LIMIT)
                start, end = spans[-1]
                text = tokenizer.decode(ids[start:end], skip_special_tokens=True).strip()
                question = replace(question, reference=text)
        except InputError as error:
            raise InputError(f"{question.source}: {error}") from None
        written.append(question)
    for line in counts.lines(f"of {len(rows):,} rows"):
        warn(line)
    return written


def with_system(messages: Sequence[dict[str, Any]], system: str | None) -> Conversation:
    """Return a conversation with a system message: its own, or else the given one."""
    if not system or messages[0]["role"] == "system":
        return with_messages(messages, messages)
    return with_messages(messages, [{"role": "system", "content": system}, *messages])


def check_system(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], system: str, flag: str = "--system"
) -> None:
    """Refuse a system message that would stand before no conversation.

    Args:
        tokenizer: with its chat template.
        rows: the conversations.
        system: the message.
        flag: what named it, for errors.

    Raises:
        InputError: every row has one of its own, or the chat template refuses it or leaves it out.
    """
    without = next((row for row in rows if row.messages[0]["role"] != "system"), None)
    if without is None:
        raise InputError(f"{flag} has no effect: every row has a system message of its own; drop it")
    if prompt_ids(tokenizer, with_system(without.messages, system)) == prompt_ids(tokenizer, without.messages):
        raise InputError(
            f"{flag} has no effect: the chat template of {tokenizer.name_or_path} leaves such a message out; drop "
            "it, or use another with --chat_template_name"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> list[int]:
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
