"""A hard prompt: a text, or turns, that stand between the soft prompt and every example, given once.

Instruction prompt tuning (Singhal et al. 2023, Med-PaLM) trains a soft prompt before such a text. It is put there as
tokens, as a `Context` is. What a run trained with stands in its run.json, so that the tools use it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, forms
from open_instruct.data.context import MAX_BYTES, Context, context_of, read_context
from open_instruct.errors import InputError, input_faults
from open_instruct.small_files import read_text

FLAG = "--hard_prompt"
KEY = "hard_prompt"  # of run.json
Content = str | list[dict[str, Any]]


@dataclass(frozen=True)
class HardPrompt:
    """What stands before every example.

    Args:
        content: its text, or its messages.
        tokens: the same as tokens.
    """

    content: Content
    tokens: Context

    def record(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return {"content": self.content, "tokens": len(self.tokens.ids)}

    def describe(self) -> str:
        """Return a line on what it is."""
        form = "turns of a conversation" if not isinstance(self.content, str) else "plain text"
        if isinstance(self.content, str) and self.tokens.is_system:
            form = "a system message"
        return f"hard prompt: {len(self.tokens.ids):,} tokens before each example, as {form}"


def read_hard_prompt(path: str) -> Content:
    """Return the text of a file, or the messages of a .json file.

    Raises:
        InputError: it can't be read, is empty, or holds no list of messages.
    """
    if Path(path).suffix != ".json":
        return read_context(path, FLAG)
    source = f"{FLAG} {path}"
    text = read_text(Path(path), source, "name a file of messages", MAX_BYTES)
    with input_faults(source, "give a JSON array of {role, content} objects"):
        return messages_of(json.loads(text), source)


def messages_of(value: Any, source: str) -> list[dict[str, Any]]:
    """Return checked messages that a conversation can follow.

    Raises:
        InputError: they are none, or end with the user's turn.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise InputError(f"{source} must be a JSON array of {{role, content}} objects that is not empty")
    messages = [forms.check_message(f"{source}: message {number}", item) for number, item in enumerate(value, start=1)]
    if messages[-1]["role"] not in ("assistant", "system"):
        raise InputError(f"{source} ends with a turn of the {messages[-1]['role']}: end it with the assistant's answer")
    return messages


def hard_prompt_of(content: Content, tokenizer: PreTrainedTokenizerBase) -> HardPrompt:
    """Return a text or messages with its tokens.

    Raises:
        InputError: the tokenizer is an encoder–decoder's, or its chat template changes what follows the messages.
    """
    if isinstance(content, str):
        return HardPrompt(content, context_of(content, tokenizer))
    if chat.makes_pairs(tokenizer):
        raise InputError(f"{FLAG} stands before conversations of causal language models alone: drop it")
    (alone, both), _ = chat.render_texts(tokenizer, [chat.PROBE, [*content, *chat.PROBE]])
    bos = tokenizer.bos_token
    begins = bos if bos and alone.startswith(bos) else ""
    alone = alone.removeprefix(begins)
    if not both.endswith(alone) or not both.startswith(begins):
        raise InputError(
            f"{FLAG}: the chat template writes a conversation otherwise where turns stand before it: give a text file"
        )
    ids = tokenizer(both[: -len(alone)], add_special_tokens=False, verbose=False)["input_ids"]
    return HardPrompt(content, Context(tuple(ids), int(bool(begins)), True))


def recorded(value: Any, source: str) -> Content | None:
    """Return the content of the entry of a run.json, or None where it has none.

    Raises:
        InputError: it can't be used.
    """
    if value is None:
        return None
    content = value.get("content") if isinstance(value, dict) else None
    if isinstance(content, str) and content.strip():
        return content
    return messages_of(content, f"{source}: {KEY}")
