"""Arrow schemas and batches in the words of this room: what a column holds, and rows as records."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from mmray.data.columns import Kind
from mmray.data.rows import Record


def records_of(batch: pa.RecordBatch) -> Iterator[Record]:
    """Yield a batch's rows by column name; a row whose text is not UTF-8 as the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"text that is not UTF-8 ({error})"


def kinds_of_schema(schema: pa.Schema) -> dict[str, Kind]:
    """Return what each column holds, judged by its type."""
    return {field.name: _kind(field.type) for field in schema}


def _kind(kind: pa.DataType) -> Kind:
    if isinstance(kind, pa.BaseExtensionType):
        return _kind(kind.storage_type)
    types = pa.types
    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_null(kind):
        return "unknown"
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        return "number"
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "bytes"
    if types.is_struct(kind):
        return "image" if {field.name for field in kind} & {"bytes", "path"} else "other"
    return _kind_of_list(kind.value_type) if _is_list(kind) else "other"


def _kind_of_list(item: pa.DataType) -> Kind:
    if pa.types.is_struct(item):
        return "questions" if {"question", "answer"} <= {field.name for field in item} else "other"
    if _is_list(item):
        inner = _kind(item.value_type)
        return "boxes" if inner == "number" else "questions" if inner == "text" else "other"
    return "texts" if _kind(item) == "text" else "unknown" if pa.types.is_null(item) else "other"


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
