"""Arrow record batches → JSON Lines, exactly: what JSON can't hold is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from open_instruct.data.arrow_checks import texts_of, with_bytes
from open_instruct.data.texts import plain, shown
from open_instruct.errors import InputError, input_faults

EXACT = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_boolean,
    pa.types.is_null,
    pa.types.is_integer,
    pa.types.is_float32,
    pa.types.is_float64,
)
AS_TEXT = (pa.types.is_temporal, pa.types.is_decimal)


def check_types(schema: pa.Schema, columns: Sequence[str], dates: bool = False) -> None:
    """Check that JSON can hold columns exactly.

    Args:
        schema: the table's columns.
        columns: names of those to be written.
        dates: dates, times and decimal numbers may become text.

    Raises:
        InputError: a type that JSON does not have, or two columns or fields of one name.
    """

    def is_exact(kind: Any) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            return is_exact(kind.value_type)
        if pa.types.is_struct(kind):
            names = [field.name for field in kind]
            return len(set(names)) == len(names) and all(is_exact(field.type) for field in kind)
        return any(test(kind) for test in (*EXACT, *(AS_TEXT if dates else ())))

    twice = [name for name in dict.fromkeys(columns) if schema.names.count(name) > 1 or list(columns).count(name) > 1]
    if twice:
        raise InputError(f"column {shown(twice[0])} stands there twice: name each column once, with --columns")
    types = {name: schema.field(name).type for name in columns}
    bad = [f"{plain(name)} ({kind})" for name, kind in types.items() if not is_exact(decoded(kind))]
    if bad:
        raise InputError(f"JSON can't hold the columns {', '.join(bad)} exactly: choose others with --columns")


def decoded(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, which a dictionary may hold once each."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def to_lines(batch: pa.RecordBatch | pa.Table, source: str) -> bytes:
    """Return one JSON object a line, as UTF-8; numbers read back equal.

    Args:
        batch: the rows, checked by `check_batch`, of types that `check_types` accepts.
        source: the rows' file and numbers, for errors.

    Raises:
        InputError: text that is not UTF-8, or a number that JSON does not have.
    """
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        check_text(column, name, source)
        if has_floats(column.type) and any_not_finite(column):
            raise InputError(
                f"{source}: column {plain(name)} holds NaN or an infinity, which JSON does not have: "
                "choose others with --columns"
            )
        columns.append(column)
    names = [str(number) for number in range(len(columns))]
    frame = pl.from_arrow(pa.table(columns, names=names))
    assert isinstance(frame, pl.DataFrame)
    frame.columns = batch.schema.names  # polars itself would give a column without a name another one
    buffer = io.BytesIO()
    frame.lazy().sink_ndjson(buffer)
    return buffer.getvalue()


def check_text(column: pa.Array | pa.ChunkedArray, name: str, source: str) -> None:
    """Check that text is UTF-8 before polars reads it: it trusts Arrow, which has not looked.

    Raises:
        InputError: a row's text is not.
    """
    try:
        for texts in texts_of(column):
            as_bytes = texts.view(with_bytes(texts.type))
            pl.Series(pl.from_arrow(as_bytes)).cast(pl.String)  # the fastest check at hand
        return
    except pl.exceptions.PolarsError:
        pass
    for row in range(len(column)):
        with input_faults(
            f"{source}: column {plain(name)} of row {row} of these", "fetch the file again, or drop the row"
        ):
            column.slice(row, 1).to_pylist()


def any_not_finite(array: pa.Array | pa.ChunkedArray) -> bool:
    """Return whether a NaN or an infinity stands anywhere in an array, nested or not."""
    if isinstance(array, pa.ChunkedArray):
        return any(any_not_finite(chunk) for chunk in array.chunks)
    if pa.types.is_floating(array.type):
        return pc.any(pc.invert(pc.is_finite(array))).as_py() or False
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return any_not_finite(array.flatten())
    if pa.types.is_struct(array.type):
        return any(any_not_finite(child) for child in array.flatten())
    return False


def has_floats(kind: pa.DataType) -> bool:
    """Return whether floating-point numbers can stand anywhere in a type."""
    return bool(pa.types.is_floating(kind)) or any(has_floats(kind.field(i).type) for i in range(kind.num_fields))
