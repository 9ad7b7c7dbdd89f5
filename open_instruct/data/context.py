"""A text that stands before every conversation: what a distilled adapter replaces.

It stands there as a system message where the chat template writes one as text of its own before the conversation, else
as plain text. Only token ids leave this module, so training, evaluation and generation put the same tokens first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat
from open_instruct.data.chat import Spans
from open_instruct.errors import InputError
from open_instruct.small_files import read_text

MAX_BYTES = 1 << 26


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
    """Return a text as a context."""
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
