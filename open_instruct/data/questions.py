"""Rows of any known form → questions, each with its reference answer where the row has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, forms
from open_instruct.data.reading import Row
from open_instruct.errors import InputError


@dataclass(frozen=True)
class Question:
    """A conversation up to the turn that is to be answered."""

    source: str  # file and line of the row, for errors
    messages: list[dict[str, Any]]
    reference: str | None  # the turn itself, where the row has it

    @property
    def text(self) -> str:
        """Return the last message, for tables."""
        return str(self.messages[-1]["content"])


def questions(rows: Iterable[Row], key: str = "messages") -> Iterator[Question]:
    """Yield one question a row: everything before the assistant's last turn if the row ends with it, else all of it.

    Raises:
        InputError: a row of no known form, or with content that is no text.
    """
    for source, row in rows:
        messages = forms.to_messages(source, row, key, answered=False)
        if messages[-1]["role"] == "assistant":
            yield Question(source, messages[:-1], str(messages[-1]["content"]))
        else:
            yield Question(source, messages, None)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Return the token ids of a conversation that the assistant is to continue, as in training.

    Raises:
        InputError: the chat template can't hold it, for example a system message, or two turns of one role.
    """
    (text,), _ = chat.render_texts(tokenizer, [messages], add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the chat template writes nothing for a question: use another with --chat_template_name")
    return ids
