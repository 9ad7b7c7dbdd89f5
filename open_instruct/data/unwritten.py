"""Tools and calls of tools that a chat template leaves out, found by rendering conversations with and without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from open_instruct.data.chat import Messages, render_texts
from open_instruct.data.sources import Conversation, tools_of, with_messages
from open_instruct.data.tools import CALLS, TOOLS, has_calls, without_calls
from open_instruct.errors import InputError

REMEDY = "name one that does with --chat_template_name (tokenizer: the model's own)"


@dataclass
class Unwritten:
    """Conversations whose tools, or calls of tools, the chat template does not write."""

    num_tools: int = 0  # conversations that offer tools of which the text says nothing
    num_calls: int = 0  # conversations with calls of which the text says nothing

    def add(self, other: Unwritten) -> None:
        """Add the counts of others."""
        self.num_tools += other.num_tools
        self.num_calls += other.num_calls

    def lines(self, what: str) -> list[str]:
        """Return a line for each count that is not 0; `what` names the conversations, as "of 100 rows"."""
        counts = {TOOLS: self.num_tools, " and ".join(CALLS): self.num_calls}
        return [
            f"the chat template writes no {name}, which {count:,} {what} have, so the model does not see them: {REMEDY}"
            for name, count in counts.items()
            if count
        ]


def unwritten(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Messages]) -> Unwritten:
    """Return of how many conversations the tokenizer's template leaves something out.

    Raises:
        InputError: the template can't hold a conversation, or leaves out all that an answer says.
    """
    counts = Unwritten()
    offering = [messages for messages in batch if tools_of(messages)]
    calling = [messages for messages in batch if any(map(has_calls, messages))]
    for messages in offering:
        counts.num_tools += reads_alike(tokenizer, messages, Conversation(messages))
    for messages in calling:
        if reads_alike(tokenizer, messages, with_messages(messages, map(without_calls, messages))):
            silent = [n for n, m in enumerate(messages, 1) if has_calls(m) and not str(m["content"] or "").strip()]
            if silent:
                raise InputError(
                    f"message {silent[0]} calls tools and says nothing else, and the chat template does not write "
                    f"calls: {REMEDY}"
                )
            counts.num_calls += 1
    return counts


def reads_alike(tokenizer: PreTrainedTokenizerBase, messages: Messages, other: Messages) -> bool:
    """Return whether the template writes the same for both, the first of which it can write."""
    (text,), _ = render_texts(tokenizer, [messages])
    try:
        (changed,), _ = render_texts(tokenizer, [other])
    except InputError:  # it needs what the other lacks
        return False
    return text == changed
