"""Lists of equal length as flat columns of a Parquet file, which are read three times as fast as nested ones.

Parquet stores two levels per number of a nested list, and decoding them takes longer than decoding the numbers. Parts
of a shard have lists over all neurons. They are written flat: a row per number, and the table itself, with empty lists,
in the file's metadata.
"""

from __future__ import annotations

import base64
import inspect
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

ROWS = b"mmray.rows"
"""Key of the metadata that holds the table with empty lists: an Arrow stream, in base64."""
FEWEST = 1 << 16
"""Numbers per column that make flat columns worth while."""
NUMBERS = (pa.int32(), pa.int64(), pa.float32(), pa.float64())
"""Types whose bytes Parquet can split by significance."""

# Small pages take more space. Earlier versions of Arrow limit their bytes only.
_LIMIT = "max_rows_per_page"
UNLIMITED: dict[str, Any] = {_LIMIT: 1 << 30} if _LIMIT in inspect.signature(pq.write_table).parameters else {}
"""Options of `pq.write_table` for pages of any number of rows."""


def flat_bytes(table: pa.Table) -> bytes | None:
    """Return a Parquet file of the table with its lists flat; None if they differ in length, or are short.

    Lists may be null. They must be of numbers.
    """
    names = [field.name for field in table.schema if pa.types.is_list(field.type)]
    if not names or any(table.schema.field(name).type.value_type not in NUMBERS for name in names):
        return None
    lists = {name: table[name].combine_chunks() for name in names}
    lengths = np.unique(np.concatenate([column.value_lengths().drop_null().to_numpy() for column in lists.values()]))
    if len(lengths) != 1 or len(table) * lengths[0] < FEWEST:
        return None
    rows, columns, fields = table, {}, []
    for name, column in lists.items():
        field, present = table.schema.field(name), column.is_valid().to_numpy(zero_copy_only=False)
        columns[name] = _spread(column.flatten(), present, int(lengths[0]))
        fields.append(pa.field(name, field.type.value_type, nullable=not present.all()))
        empty = _lists(pa.array([], field.type.value_type), present, 0, field.type)
        rows = rows.set_column(rows.schema.get_field_index(name), field, empty)
    # In this file's metadata, because a second file per part would be a second request to S3.
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)
    schema = pa.schema(fields, metadata={ROWS: base64.b64encode(stream.getvalue())})
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(columns, schema=schema),
        buffer,
        row_group_size=len(table) * int(lengths[0]),
        # Written in half, and read in two thirds of the time of zstd, for 8 to 13 % more bytes.
        compression="lz4",
        use_dictionary=False,
        column_encoding={name: _encoding(column.flatten()[: lengths[0]].to_numpy()) for name, column in lists.items()},
        write_page_checksum=True,
        write_statistics=False,
        **UNLIMITED,
    )
    return buffer.getvalue()


def read_flat(file: pq.ParquetFile) -> pa.Table | None:
    """Return the table that `flat_bytes` wrote; None if it did not write this file."""
    if ROWS not in (file.metadata.metadata or {}):
        return None
    with pa.ipc.open_stream(base64.b64decode(file.metadata.metadata[ROWS])) as stream:
        rows = stream.read_all()
    # In this thread: parts are read several at a time, and Arrow's own threads may outlive the bytes; see `from_bytes`.
    numbers = file.read(use_threads=False)
    for name in numbers.column_names:
        field, present = rows.schema.field(name), rows[name].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
        # One row group makes one chunk, which `combine_chunks` would copy.
        (values,) = numbers[name].chunks
        values, length = values.drop_null() if values.null_count else values, len(numbers) // len(rows)
        column = _lists(values, present, length, field.type)
        rows = rows.set_column(rows.schema.get_field_index(name), field, column)
    return rows


def _encoding(first: ndarray) -> str:
    """Return the encoding of lists, judging by the first: differences of rising integers, else bytes by significance.

    Compressed, both take half the space.
    """
    rises = first.dtype.kind == "i" and bool((first[1:] >= first[:-1]).all())
    return "DELTA_BINARY_PACKED" if rises else "BYTE_STREAM_SPLIT"


def _lists(values: pa.Array, present: ndarray, length: int, kind: pa.DataType) -> pa.ListArray:
    """Return a column of lists of that length, null where one is not present."""
    offsets = np.concatenate([[0], np.cumsum(present)]) * length
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values, kind, mask=pa.array(~present))


def _spread(values: pa.Array, present: ndarray, length: int) -> pa.Array:
    """Return the numbers of the lists that are present, and nulls in place of those of the others."""
    if present.all() or not present.any():
        return values if len(values) else pa.nulls(len(present) * length, values.type)
    spread = np.zeros((len(present), length), values.type.to_pandas_dtype())
    spread[present] = values.to_numpy().reshape(-1, length)
    return pa.array(spread.reshape(-1), mask=np.repeat(~present, length))
