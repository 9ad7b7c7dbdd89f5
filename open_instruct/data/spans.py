"""Spans of a conversation that are learned: of characters, as a chat template writes it, and of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from open_instruct.data.templates import is_before

Spans = list[tuple[int, int]]
Labels = Literal["answers", "last", "all"]  # what is learned of a conversation
NOT_LEARNED = (1, 1)  # in place of the span of an answer; no other is empty


@dataclass
class Rewritten:
    """Answers that a chat template without `generation` blocks writes otherwise than it asks for them."""

    num_conversations: int = 0  # with such answers
    num_shortened: int = 0  # that only end otherwise: learned without their end
    num_left_out: int = 0  # that are not learned

    def add(self, other: Rewritten) -> None:
        """Add the counts of others."""
        self.num_conversations += other.num_conversations
        self.num_shortened += other.num_shortened
        self.num_left_out += other.num_left_out

    def lines(self, what: str) -> list[str]:
        """Return a line, if there are such answers; `what` names the conversations, as "of 100 rows"."""
        if not self.num_conversations:
            return []
        return [
            f"the chat template rewrites answers when other turns follow, in {self.num_conversations:,} {what}: "
            f"{self.num_left_out:,} answers are not learned, as the model would not write them so, and "
            f"{self.num_shortened:,} are learned without their end; {{% generation %}} in it says what to learn"
        ]


def own_spans(messages: Sequence[dict[str, Any]], answers: Spans) -> Spans:
    """Return the spans of a conversation's own answers: exemplars before it are not learned."""
    return answers[-1:] if any(is_before(message) for message in messages) else answers


def learned_spans(labels: Labels, answers: Spans, num_tokens: int) -> Spans:
    """Return the token spans [start, end) that are learned of a conversation cut at `num_tokens`.

    Args:
        labels: "answers": all of the assistant's turns; "last": the last one, an empty span where it is cut away or
            not learned; "all": every token but the first, which nothing predicts.
        answers: spans of the assistant's turns in the whole conversation, at least one; empty where not learned.
        num_tokens: tokens that are kept.
    """
    if labels == "all":
        return [(1, num_tokens)]
    if labels == "last":
        start, end = answers[-1]
        return [(min(start, num_tokens), min(end, num_tokens))] if start < end else [(num_tokens, num_tokens)]
    return [(start, min(end, num_tokens)) for start, end in answers if start < min(end, num_tokens)]


def token_spans(offsets: Sequence[tuple[int, int]], character_spans: Spans) -> Spans:
    """Return the token spans [start, end) of the tokens that have a character in a character span.

    Args:
        offsets: the characters [start, end) of each token, in order.
        character_spans: the spans, in order and without overlap; NOT_LEARNED stays as it is.
    """
    spans, position = [], 0  # one pass: no token is looked at for a span before those of an earlier one
    for start, end in character_spans:
        if (start, end) == NOT_LEARNED:
            spans.append(NOT_LEARNED)
            continue
        while position < len(offsets) and offsets[position][1] <= start:
            position += 1
        first = position
        while position < len(offsets) and offsets[position][0] < end:
            position += 1
        if position > first:
            spans.append((first, position))
    return spans
