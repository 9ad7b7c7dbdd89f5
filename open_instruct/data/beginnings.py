"""The tokens that all examples of a set begin with: in a packed row they are computed once.

What follows a token changes nothing of it under causal attention, so sharing is exact where the shared tokens are no
targets: none of them is labelled, and neither is the first token behind them, which the last of them would predict.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from open_instruct.data.dataset import Examples

LEAST = 32  # tokens that are worth it: fewer are a template's marks before every question
ROWS_AT_ONCE = 8192


def common_beginning(examples: Examples) -> tuple[int, ...]:
    """Return the tokens, all without a label, that each example begins with; empty if they are fewer than LEAST."""
    found: np.ndarray | None = None
    for ids, starts, bounds, first_spans in parts(examples):
        # Behind the shared tokens stands one that is read and not predicted, then the first label.
        longest = int(bounds[first_spans].min()) - 1
        if found is None:
            found = ids[starts[0] : starts[0] + max(longest, 0)].copy()
        found = found[: max(longest, 0)]
        for first in range(0, len(starts), ROWS_AT_ONCE):
            if len(found) < LEAST:
                return ()
            window = ids[starts[first : first + ROWS_AT_ONCE, None] + np.arange(len(found))]
            agrees = (window == found).all(0)
            found = found[: len(found) if agrees.all() else int(agrees.argmin())]
    return tuple(found.tolist()) if found is not None and len(found) >= LEAST else ()


def parts(examples: Examples) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, of each chunk of the table that holds examples, without copying its tokens.

    Yields:
        The tokens of all rows of the chunk; where each example [N] starts in them; the bounds of all spans of the
        chunk; where those of each example [N] start in them.
    """
    rows = np.sort(examples.rows)
    spans, first = examples.table["spans"].combine_chunks(), 0
    span_offsets, bounds = offsets_of(spans), spans.values.to_numpy(zero_copy_only=False)
    for chunk in examples.table["input_ids"].chunks:
        own = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(chunk))]
        if len(own):
            ids = chunk.values.to_numpy(zero_copy_only=False)
            yield ids, offsets_of(chunk)[own - first], bounds, span_offsets[own]
        first += len(chunk)


def offsets_of(column: pa.ListArray) -> np.ndarray:
    """Return where each list of a column starts in its values."""
    offsets: np.ndarray = column.offsets.to_numpy(zero_copy_only=False)
    return offsets[:-1]
