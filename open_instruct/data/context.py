"""A text that stands before every conversation: what a distilled adapter replaces.

It stands there as a system message where the chat template writes one as text of its own before the conversation, else
as plain text. Only token ids leave this module, so training, evaluation and generation put the same tokens first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, forms
from open_instruct.data.spans import Spans
from open_instruct.data.texts import plain
from open_instruct.errors import InputError
from open_instruct.small_files import read_text

MAX_BYTES = 1 << 26
CONTEXT = "context"  # role of the message that holds a row's own context, on its way to the tokenizer


@dataclass(frozen=True)
class Context:
    """The tokens of a context.

    Args:
        ids: its tokens, the beginning-of-sequence token that the template writes included.
        num_shared: first tokens of every conversation that `ids` begins with, too: 1 with such a token, else 0.
        is_system: it stands there as a system message, else as plain text.
    """

    ids: tuple[int, ...]
    num_shared: int
    is_system: bool

    def before(self, row: Sequence[int], spans: Sequence[tuple[int, int]] = ()) -> tuple[list[int], Spans]:
        """Return a conversation's tokens with the context before them, and its labelled spans where they are then."""
        moved = len(self.ids) - self.num_shared
        return [*self.ids, *row[self.num_shared :]], [(start + moved, end + moved) for start, end in spans]

    @property
    def key(self) -> str:
        """A hash of the tokens."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:16]

    def describe(self) -> str:
        """Return in words what it is."""
        form = "a system message" if self.is_system else "plain text: the chat template writes no system message first"
        return f"context: {len(self.ids):,} tokens, as {form}"


def read_context(path: str, flag: str) -> str:
    """Return the text of a context.

    Args:
        path: a text file, UTF-8.
        flag: the flag that named the file, for errors.

    Raises:
        InputError: it can't be read, or has no text.
    """
    text = read_text(Path(path), f"{flag} {path}", "name a text file", MAX_BYTES)
    if not text.strip():
        raise InputError(f"{flag} {path} is empty: name a file with the text of the context")
    return text


def context_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Context:
    """Return a text as a context.

    Raises:
        InputError: the tokenizer is an encoder–decoder's, whose sources end with a token of their own.
    """
    if chat.makes_pairs(tokenizer):
        raise InputError("a context stands before conversations of causal language models alone: drop --context here")
    (alone,), _ = chat.render_texts(tokenizer, [chat.PROBE])
    bos = tokenizer.bos_token
    begins = bos if bos and alone.startswith(bos) else ""
    before = system_text(text, alone.removeprefix(begins), begins, tokenizer)
    plain = text.rstrip("\n") + "\n\n"
    ids = tokenizer(begins + (plain if before is None else before), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return Context(tuple(ids), int(bool(begins)), before is not None)


def system_text(text: str, alone: str, begins: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return what the template writes for a system message, or None where that does not just stand before the rest.

    Args:
        text: the system message.
        alone: the sample conversation as the template writes it, without its beginning.
        begins: beginning-of-sequence token of every conversation, or "".
        tokenizer: with its chat template.
    """
    try:
        (both,), _ = chat.render_texts(tokenizer, [[{"role": "system", "content": text}, *chat.PROBE]])
    except InputError:  # many templates refuse system messages
        return None
    both = both.removeprefix(begins)
    if not both.endswith(alone) or text.strip() not in both[: -len(alone)]:
        return None
    return both[: -len(alone)]


@dataclass(frozen=True)
class ContextSource:
    """Where the context of a row stands: in a column, in its system message, or in a file that holds for all rows.

    Args:
        column: name of the column, or None.
        text: of the file, or None. With neither, it is the system message.
    """

    column: str | None = None
    text: str | None = None

    @property
    def is_by_row(self) -> bool:
        """Rows have contexts of their own."""
        return self.text is None

    @property
    def key(self) -> str:
        """What tells this source from others, for the token cache."""
        shared = self.text and hashlib.sha256(self.text.encode()).hexdigest()
        return f"behind a context: {self.column!r} {shared}"

    def with_context(self, source: str, row: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a row's messages with its own context before them, as a message of the role CONTEXT.

        Raises:
            InputError: the row has none where it needs one, or another than the file's.
        """
        if self.column:
            text = forms.optional_text(source, row, self.column)
            if not text.strip():
                raise InputError(
                    f"{source}: no text in `{plain(self.column)}`, the column of --distill_column (columns: "
                    f"{plain(', '.join(row))}): name another column, or remove the row"
                )
            return [{"role": CONTEXT, "content": text}, *messages]
        if self.text is not None:
            own = row.get(CONTEXT)
            if isinstance(own, str) and own.strip() and own.strip() != self.text.strip():
                raise InputError(
                    f"{source}: its `{CONTEXT}` is another text than that of --distill_context: distil the rows' own "
                    f"texts with --distill_column {CONTEXT} instead, or remove the column"
                )
            return messages
        if messages[0]["role"] != "system":
            return messages
        if len(messages) == 1 or messages[1]["role"] == "system":
            raise InputError(f"{source}: --distill_system takes one system message before a conversation: mend the row")
        return [{**messages[0], "role": CONTEXT}, *messages[1:]]


def source_of(file: str | None, column: str | None, is_system: bool) -> ContextSource | None:
    """Return where the contexts of rows stand, with the text of a file; None where there are none.

    Args:
        file: of --distill_context, or None.
        column: of --distill_column, or None.
        is_system: they are the rows' system messages.

    Raises:
        InputError: the file can't be read.
    """
    if not (file or column or is_system):
        return None
    return ContextSource(column, file and read_context(file, "--distill_context"))


def split_context(messages: Sequence[dict[str, Any]]) -> tuple[str, Sequence[dict[str, Any]]]:
    """Return the text of a row's own context, "" where it has none, and its other messages."""
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == CONTEXT else ("", messages)


class ContextTokens:
    """Tokens of texts that stand before conversations; those of the last texts are kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a tokenizer with its chat template."""
        self.of_text = lru_cache(256)(lambda text: context_of(text, tokenizer))

    def of(self, text: str) -> list[int]:
        """Return the ids of a text as a context; none of an empty one."""
        return list(self.of_text(text).ids) if text else []


@dataclass(frozen=True)
class RowContexts:
    """Contexts that differ between rows; the examples hold their tokens.

    Args:
        num_shared: first tokens of every conversation that each context begins with, too.
        sample: tokens of one of them.
        num_rows: training examples.
        num_with: those that have a context.
        mean_length: its tokens, on average.
    """

    num_shared: int
    sample: tuple[int, ...]
    num_rows: int
    num_with: int
    mean_length: float

    @property
    def key(self) -> str:
        """What is compared on resume; the tokens are part of the examples' content."""
        return "the rows' own"

    def describe(self) -> str:
        """Return in words what they are."""
        return (
            f"contexts: {self.num_with:,} of {self.num_rows:,} training rows have one of their own, of "
            f"{self.mean_length:,.0f} tokens on average"
        )
