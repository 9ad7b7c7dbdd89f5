"""Arrow record batches → JSON Lines, exactly: what JSON can't hold is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from open_instruct.errors import InputError


def check_types(schema: pa.Schema, columns: Sequence[str]) -> None:
    """Raise an InputError that names the columns whose types JSON can't hold exactly."""
    plain = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_boolean,
        pa.types.is_null,
        pa.types.is_integer,
        pa.types.is_float32,
        pa.types.is_float64,
    )

    def is_exact(kind: Any) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_exact(kind.value_type)
        if pa.types.is_struct(kind):
            return all(is_exact(kind.field(i).type) for i in range(kind.num_fields))
        return any(test(kind) for test in plain)

    bad = [f"{name} ({schema.field(name).type})" for name in columns if not is_exact(schema.field(name).type)]
    if bad:
        raise InputError(f"JSON can't hold the columns {', '.join(bad)} exactly: choose others with --columns")


def to_lines(batch: pa.RecordBatch | pa.Table, source: str) -> bytes:
    """Return one JSON object a line, as UTF-8; numbers read back equal.

    Args:
        batch: the rows.
        source: the rows' file and numbers, for errors.

    Raises:
        InputError: text that is not UTF-8, or a number that JSON does not have.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if has_floats(column.type) and any_not_finite(column):
            raise InputError(
                f"{source}: column {name} holds NaN or an infinity, which JSON does not have: "
                "choose others with --columns"
            )
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    buffer = io.BytesIO()
    frame.lazy().sink_ndjson(buffer)
    lines = buffer.getvalue()
    # polars trusts Arrow that text is UTF-8, and nothing has checked it: the output shows whether it was.
    try:
        pl.Series([lines], dtype=pl.Binary).cast(pl.String)  # the fastest check of UTF-8 at hand
    except pl.exceptions.PolarsError:
        row = next(
            number for number, line in enumerate(lines.split(b"\n")) if line.decode("utf-8", "ignore").encode() != line
        )
        raise InputError(
            f"{source}: the text of row {row} of these is not valid UTF-8: fetch the file again, or drop the row"
        ) from None
    return lines


def any_not_finite(array: pa.Array | pa.ChunkedArray) -> bool:
    """Return whether a NaN or an infinity stands anywhere in an array, nested or not."""
    if isinstance(array, pa.ChunkedArray):
        return any(any_not_finite(chunk) for chunk in array.chunks)
    if pa.types.is_floating(array.type):
        return pc.any(pc.invert(pc.is_finite(array))).as_py() or False
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return any_not_finite(array.flatten())
    if pa.types.is_struct(array.type):
        return any(any_not_finite(child) for child in array.flatten())
    return False


def has_floats(kind: pa.DataType) -> bool:
    """Return whether floating-point numbers can stand anywhere in a type."""
    return bool(pa.types.is_floating(kind)) or any(has_floats(kind.field(i).type) for i in range(kind.num_fields))
