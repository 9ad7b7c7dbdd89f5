"""Conversations → tables of token ids and spans, batch by batch, with counts of what happened to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from open_instruct.data import chat, duplicates
from open_instruct.data.bad_rows import BadRows
from open_instruct.data.context import ContextTokens, split_context
from open_instruct.data.pairs import fit_pair
from open_instruct.data.sources import SOURCE
from open_instruct.data.spans import Labels, Rewritten, Spans, learned_spans
from open_instruct.data.token_cache import schema_of
from open_instruct.data.unwritten import Unwritten, unwritten
from open_instruct.errors import InputError

BATCH_ROWS = 1000
NO_LIMIT = 2**31  # tokens of a row: what is too long is cut, and counted, after it is tokenised


@dataclass
class LeftOut:
    """What the chat template leaves out of conversations."""

    unwritten: Unwritten = field(default_factory=Unwritten)
    rewritten: Rewritten = field(default_factory=Rewritten)

    def lines(self, what: str) -> list[str]:
        """Return lines on it; `what` names the conversations, as "of 100 rows"."""
        return [*self.unwritten.lines(what), *self.rewritten.lines(what)]


def new_counts() -> dict[str, Any]:
    """Return the counts of `tokenize_all` at zero.

    `first_label` is the tokens before the earliest answer, 0 if there is no answer; `bad_rows` a line about rows that
    were left out; `by_template` lines about what the chat template leaves out.
    """
    return {"num_read": 0, "num_truncated": 0, "num_skipped": 0, "first_label": 0, "bad_rows": "", "by_template": ""}


def tokenize_all(
    named_conversations: Iterable[tuple[str, list[dict[str, Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    counts: dict[str, Any],
    bad: BadRows | None = None,
    contexts: ContextTokens | None = None,
    labels: Labels = "answers",
    num_left_out: int = 0,
) -> Iterator[pa.Table]:
    """Yield tables of tokenised rows, batch by batch, and update `counts`.

    Rows without an answer that can be predicted are left out.

    Args:
        named_conversations: (source, messages) pairs.
        tokenizer: a fast tokenizer with its chat template set.
        max_length: tokens of a conversation kept.
        counts: result of `new_counts`.
        bad: takes the errors of single rows; None: the first one is raised.
        contexts: see `build`.
        labels: see `build`.
        num_left_out: see `build`.

    Raises:
        InputError: there were bad rows, and `bad` does not skip them.
    """
    makes_pairs, left_out = chat.makes_pairs(tokenizer), LeftOut()
    with tqdm(desc="tokenising", unit=" rows", disable=None, delay=2) as progress:
        for batch in batches(named_conversations, BATCH_ROWS):
            ids, spans, texts, named = tokenize_batch(batch, tokenizer, bad, left_out)
            schema = schema_of(contexts is not None, labels != "answers")
            rows: dict[str, list[Any]] = {name: [] for name in schema.names}
            for row_ids, row_spans, text, columns in zip(ids, spans, texts, named, strict=True):
                if num_left_out:
                    row_ids = row_ids[num_left_out:]
                    row_spans = [(max(start - num_left_out, 0), end - num_left_out) for start, end in row_spans]
                counts["num_truncated"] += len(row_ids) > max_length
                if makes_pairs:
                    row_ids, row_spans = fit_pair(row_ids, row_spans, max_length)
                for start in [max(start, 1) for start, end in row_spans if end > max(start, 1)][:1]:
                    counts["first_label"] = min(counts["first_label"] or start, start)
                num_tokens = min(len(row_ids), max_length)
                answers = learned_spans("answers", row_spans, num_tokens)
                if not any(end > max(start, 1) for start, end in answers):
                    counts["num_skipped"] += 1
                    continue
                rows["input_ids"].append(row_ids[:max_length])
                learned = answers if labels == "answers" else learned_spans(labels, row_spans, num_tokens)
                rows["spans"].append([bound for span in learned for bound in span])
                if labels != "answers":
                    rows["answers"].append([bound for span in answers for bound in span])
                if contexts:
                    rows["context"].append(contexts.of(text))
                for name, value in columns.items():
                    rows[name].append(value)
            counts["num_read"] += len(ids)
            yield pa.table(rows, schema=schema)
            progress.update(len(batch))
    if bad is not None:
        bad.check()
        counts["bad_rows"] = bad.summary()
    counts["by_template"] = "\n".join(left_out.lines(f"of {counts['num_read']:,} conversations"))


def tokenize_batch(
    batch: list[tuple[str, list[dict[str, Any]]]],
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows | None,
    left_out: LeftOut,
) -> tuple[list[list[int]], list[Spans], list[str], list[dict[str, Any]]]:
    """Return the token ids of (source, messages) pairs, uncut, their answers' spans, texts of contexts, and more.

    Rows that the chat template refuses are noted as bad, and left out. What the template does not write is counted in
    `left_out`.
    """
    split = [(source, *split_context(messages)) for source, messages in batch]
    try:
        every = [messages for _, _, messages in split]
        ids, spans = tokenized(every, tokenizer, left_out)
        return ids, spans, [text for _, text, _ in split], [named_columns(row) for _, row in batch]
    except InputError:  # which rows they are is found out below
        ids, spans, texts, named = [], [], [], []
    for (source, text, messages), (_, whole) in zip(split, batch, strict=True):
        try:
            row_ids, row_spans = tokenized([messages], tokenizer, left_out)
        except InputError as error:
            refused = InputError(f"{source}: {error}")
            if bad is None:
                raise refused from None
            bad.reject(refused)
            continue
        ids += row_ids
        spans += row_spans
        texts.append(text)
        named.append(named_columns(whole))
    return ids, spans, texts, named


def tokenized(
    batch: Sequence[chat.Messages], tokenizer: PreTrainedTokenizerBase, left_out: LeftOut
) -> tuple[list[list[int]], list[Spans]]:
    """Return the token ids of conversations, uncut, and their answers' spans; count only if all can be used.

    Raises:
        InputError: the chat template refuses one.
    """
    rewritten = Rewritten()
    ids, spans = chat.tokenize(tokenizer, batch, NO_LIMIT, rewritten)
    left_out.unwritten.add(unwritten(tokenizer, batch))
    left_out.rewritten.add(rewritten)
    return ids, spans


def named_columns(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a table holds of a row besides tokens: its source, and the hashes of its conversation."""
    exact, normalised = duplicates.hashes_of(messages)
    return {SOURCE: getattr(messages, "source", ""), duplicates.EXACT: exact, duplicates.NORMALISED: normalised}


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
