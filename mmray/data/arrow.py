"""From Arrow to this package: what a column holds, by its type, and batches as records."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from mmray.data.columns import Kind
from mmray.data.rows import Record


def records_of(batch: pa.RecordBatch) -> Iterator[Record]:
    """Yield a batch's rows by column name; a row whose text is not UTF-8 becomes the reason."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        # Row by row, which is slow, so that one bad row does not fail the others.
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"text that is not UTF-8 ({error})"


def kinds_of_schema(schema: pa.Schema) -> dict[str, Kind]:
    """Return what each column holds, by its Arrow type."""
    return {field.name: _kind(field.type) for field in schema}


def _kind(arrow_type: pa.DataType) -> Kind:
    if isinstance(arrow_type, pa.BaseExtensionType):
        return _kind(arrow_type.storage_type)
    types = pa.types
    if types.is_dictionary(arrow_type):
        return _kind(arrow_type.value_type)
    if types.is_null(arrow_type):
        return "unknown"
    if types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type):
        return "text"
    if types.is_boolean(arrow_type) or types.is_integer(arrow_type) or types.is_floating(arrow_type):
        return "number"
    if types.is_binary(arrow_type) or types.is_large_binary(arrow_type) or types.is_binary_view(arrow_type):
        return "bytes"
    if types.is_struct(arrow_type):
        # Hugging Face's Image feature.
        return "image" if {field.name for field in arrow_type} & {"bytes", "path"} else "other"
    return _kind_of_list(arrow_type.value_type) if _is_list(arrow_type) else "other"


def _kind_of_list(item: pa.DataType) -> Kind:
    if pa.types.is_struct(item):
        names = {field.name for field in item}
        return "other" if "answer" not in names else "questions" if "question" in names else "answers"
    if _is_list(item):
        # Pairs of texts are questions and answers, and lists of numbers boxes.
        inner = _kind(item.value_type)
        return "boxes" if inner == "number" else "questions" if inner == "text" else "other"
    return "texts" if _kind(item) == "text" else "unknown" if pa.types.is_null(item) else "other"


def _is_list(arrow_type: pa.DataType) -> bool:
    return isinstance(arrow_type, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
