"""Reading and writing tables as Parquet, columns with units, and the schema of the table `errors`."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from mmray.errors import DamagedError
from mmray.runs.flat_lists import NUMBERS, flat_bytes, read_flat
from mmray.storage import Store

LABEL_ENTRY = pa.struct([("key", pa.string()), ("value", pa.string())])
"""Entry of a column that replaces a map, because `datasets` can't read maps."""
SPAN_ENTRY = pa.struct([("start", pa.int32()), ("stop", pa.int32())])
"""Entry of a column of half-open ranges."""


def field(name: str, kind: pa.DataType, unit: str = "") -> pa.Field:
    """Return a column with its unit in the metadata."""
    return pa.field(name, kind, metadata={"unit": unit} if unit else None)


def ordered(fields: list[pa.Field], *names: str) -> pa.Schema:
    """Return the schema of a table whose rows are in the order of these columns, by which a reader finds few fast."""
    return pa.schema(fields, metadata={ORDER: " ".join(names)})


def order_of(schema: pa.Schema) -> list[str]:
    """Return the columns by which a table's rows are ordered; none if they are not."""
    names: list[str] = (schema.metadata or {}).get(ORDER, b"").decode().split()
    return names


ERRORS = pa.schema(
    [
        field("sample_id", pa.string()),
        field("source", pa.string()),
        field("shard_id", pa.int32()),
        field("stage", pa.string()),
        field("message", pa.string()),
    ]
)
"""Failed samples: the table `errors` of a run, and a part of every unit."""

ROW_GROUP = 1 << 20
"""Bytes in memory of a row group: what a reader of a few rows has to read. Many small groups slow down reading all."""
ORDER = b"order"
"""Key of a schema's metadata that names the columns by which a table's rows are ordered."""
VECTORS_PER_PAGE = 16
"""Rows written before Parquet checks the page size. Vectors take up to megabytes, and a page must stay below 2 GB."""


def part_to_bytes(part: pa.Table) -> bytes:
    """Return a part of a unit as the bytes of one Parquet file; its lists may be flat, for `from_bytes` alone."""
    return flat_bytes(part) or to_bytes(part)


def to_bytes(table: pa.Table) -> bytes:
    """Return the table as the bytes of one Parquet file."""
    buffer = io.BytesIO()
    if not len(table):
        # Without any row group: `datasets` rejects an empty one.
        pq.ParquetWriter(buffer, table.schema).close()
        return buffer.getvalue()
    columns = list(zip(table.schema.names, table.schema.types, strict=True))
    numbers = {name: kind.value_type for name, kind in columns if pa.types.is_list(kind) and kind.value_type in NUMBERS}
    # Mixed bytes of vectors don't get smaller.
    binary = any(pa.types.is_large_binary(kind) for _, kind in columns)
    vectors = binary or any(map(pa.types.is_floating, numbers.values()))
    pq.write_table(
        table,
        buffer,
        compression="none" if binary else "zstd",
        compression_level=None if binary else 1,
        # Vectors are read whole, in one group.
        row_group_size=None if vectors else max(1, len(table) * ROW_GROUP // max(ROW_GROUP, table.nbytes)),
        # Dictionaries and statistics pay off for text and scalars; for long vectors they only cost time.
        use_dictionary=[name for name, kind in columns if pa.types.is_string(kind)],
        # Bytes of equal significance, and differences of sorted numbers, take half the space once compressed.
        column_encoding={
            f"{name}.list.element": "DELTA_BINARY_PACKED" if _rises(table[name]) else "BYTE_STREAM_SPLIT"
            for name in numbers
        },
        # A reader of a few groups can't check the SHA-256 of the file.
        write_page_checksum=True,
        write_statistics=not vectors,
        write_batch_size=VECTORS_PER_PAGE if vectors else None,
    )
    return buffer.getvalue()


def _rises(column: pa.ChunkedArray) -> bool:
    """Return whether the first list with numbers holds integers in rising order; the others are taken to be alike."""
    if not pa.types.is_integer(column.type.value_type):
        return False
    first = next((values for values in list_values(column) if len(values)), np.zeros(0, np.int64))
    return bool((first[1:] >= first[:-1]).all())


def from_bytes(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table that `to_bytes` or `part_to_bytes` wrote, or those of these columns that a table of rows has.

    Raises DamagedError for anything else.
    """
    try:
        flat = read_flat(pq.ParquetFile(pa.py_buffer(data)))
        if flat is not None:
            return flat
        # Copy the bytes to Arrow's own memory. Arrow's threads may outlive this call and hold the last reference to its
        # input; dropping a reference to Python bytes while the interpreter shuts down aborts the process.
        stream = pa.BufferOutputStream()
        stream.write(data)
        # `read_table` would build a dataset first, which takes longer than reading a small part.
        return _without_maps(pq.ParquetFile(pa.BufferReader(stream.getvalue())).read(columns))
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"no whole Parquet file ({str(error).splitlines()[0]})") from error


def _without_maps(table: pa.Table) -> pa.Table:
    """Return the table with maps as lists of entries; runs of version 0.1.0 have maps."""
    for position, column in enumerate(table.schema):
        if pa.types.is_map(column.type):
            entries = table.column(position).cast(pa.list_(LABEL_ENTRY))
            table = table.set_column(position, column.with_type(entries.type), entries)
    return table


def read_table(store: Store, name: str, folder: str = "tables") -> pa.Table:
    """Return a table from a file, or a folder of numbered files; `FileNotFoundError` if there is neither.

    Raises DamagedError, naming the file, for a damaged one.
    """
    table = f"{folder}/{name}.parquet"
    # Other programs may have written files of their own there.
    is_file = re.compile(f"{re.escape(table)}(/[0-9]+[.]parquet)?").fullmatch
    files = [entry.key for entry in store.list(table) if is_file(entry.key)]
    if not files:
        raise FileNotFoundError(f"{store.uri}/{table}")
    return pa.concat_tables([read_file(store, key) for key in files])


def with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with the columns of a schema that it lacks, null."""
    if set(schema.names) <= set(table.column_names):
        return table
    return pa.concat_tables([schema.empty_table(), table], promote_options="default")


def read_file(store: Store, key: str) -> pa.Table:
    """Return the table in a file; raises DamagedError, naming the file, if it is damaged."""
    data = store.read(key)
    try:
        return from_bytes(data)
    except DamagedError as error:
        raise DamagedError(f"{store.uri}/{key}: {error}") from error


def list_column(rows: ndarray, kind: pa.DataType, present: ndarray | None = None) -> pa.ListArray:
    """Return a column whose lists are the rows of a matrix; much faster than through Python lists.

    `present` marks the rows of the column that have a list (the next row of the matrix); the others are null.
    """
    present = np.ones(len(rows), bool) if present is None else present
    offsets = np.concatenate([[0], np.cumsum(present)]).astype(np.int32) * np.int32(rows.shape[1])
    values = np.ascontiguousarray(rows).reshape(-1).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), mask=pa.array(~present))


def vector_column(rows: ndarray, present: ndarray) -> pa.LargeBinaryArray:
    """Return a column of vectors as raw bytes, of any dtype.

    `present` marks the rows of the column that have a vector (the next row of the matrix); the others are null.
    """
    starts = np.concatenate([[0], np.cumsum(present * rows[:1].nbytes)]).astype(np.int64)
    # Arrow's layout of a binary column: validity bits, offsets, and the bytes of all values.
    buffers = [pa.array(present).buffers()[1], pa.py_buffer(starts), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.large_binary(), len(present), buffers)


def vectors(column: pa.ChunkedArray, dtype: type[np.float64 | np.float32 | np.int32]) -> list[ndarray]:
    """Return the vectors of a `vector_column`, whose bytes don't record their dtype; a null is an empty vector.

    Columns that were of raw bytes in earlier versions may hold lists now.
    """
    if pa.types.is_list(column.type):
        return list_values(column)
    return [np.frombuffer(value.as_buffer() or b"", dtype) for chunk in column.chunks for value in chunk]


def list_values(column: pa.ChunkedArray) -> list[ndarray]:
    """Return the lists of a column as arrays, without a copy; a null is an empty array."""
    arrays: list[ndarray] = []
    for chunk in column.chunks:
        # The raw buffer: `flatten` calls a kernel, whose overhead dominates for short columns.
        values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        arrays.extend(values[start:stop] for start, stop in pairwise(offsets))
    return arrays
