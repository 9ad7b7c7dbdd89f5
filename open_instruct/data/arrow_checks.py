"""Checks of what a file says about its record batches: Arrow believes it, and would read wherever offsets point."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

MAX_EMPTY_ROWS = 1_000_000  # rows of a batch that need no byte, as those of null columns


def check_batch(batch: pa.RecordBatch) -> None:
    """Check lengths, offsets, indices and nesting of a batch; whether text is UTF-8 shows when it is decoded.

    Arrow's own check of text takes a third of a conversion's time. So text is looked at as bytes, which copies nothing.

    Raises:
        ArrowInvalid: a buffer does not hold what the batch says.
        ValueError: the batch says that it has more rows than its bytes can hold.
    """
    batch.validate()
    for column in batch.columns:
        kind = with_bytes(column.type)
        (column if kind.equals(column.type) else column.view(kind)).validate(full=True)
    if batch.num_rows > max(MAX_EMPTY_ROWS, 8 * batch.nbytes):
        raise ValueError(f"a batch of {batch.nbytes} bytes is said to hold {batch.num_rows} rows")


def with_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same buffers with bytes in place of text, within lists and structs too."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(with_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(with_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(with_bytes(field.type)) for field in kind])
    return kind


def texts_of(array: pa.Array | pa.ChunkedArray) -> Iterator[pa.Array]:
    """Yield the arrays of text in an array, within lists and structs too."""
    if isinstance(array, pa.ChunkedArray):
        for chunk in array.chunks:
            yield from texts_of(chunk)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        yield from texts_of(array.flatten())
    elif pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from texts_of(child)
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        yield array
