"""Every Arrow schema of a run, with the unit of each column in its metadata, and the Parquet bytes of a table."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy import ndarray

from mmray.errors import DamagedError
from mmray.storage import Store

SCORE = "by score: logit before the final norm (after it with fold_norm); gradients: logit; effect: log-odds"
ACTIVATION = "activation"
COUNT = "count"
EXACT = (
    "whether every shard with the concept kept the neuron; if not, score, score_std, specific, selective and "
    "activation lack what shards left out"
)

NEURON_ENTRY = pa.struct(
    [("layer", pa.int16()), ("unit", pa.int32()), ("score", pa.float32()), ("activation", pa.float32())]
)
LABEL_ENTRY = pa.struct([("key", pa.string()), ("value", pa.string())])
"""What a map consists of: `datasets` can't read maps."""


def field(name: str, kind: pa.DataType, unit: str = "") -> pa.Field:
    """Return a column with its unit in the metadata."""
    return pa.field(name, kind, metadata={"unit": unit} if unit else None)


SCHEMAS: dict[str, pa.Schema] = {
    "captions": pa.schema(
        [
            field("sample_id", pa.string()),
            field("caption", pa.string()),
            field("source", pa.string(), "dataset or generated"),
            field("language", pa.string()),
            field("domain", pa.string()),
            field("shard_id", pa.int32()),
            field("labels", pa.list_(LABEL_ENTRY), "further labels of --label-column: key the column, value the label"),
            field("image", pa.string(), "16 hexadecimal digits of the SHA-256 of its bytes; null: text alone"),
        ]
    ),
    "occurrences": pa.schema(
        [
            field("sample_id", pa.string()),
            field("concept", pa.string()),
            field("token", pa.string()),
            field("token_id", pa.int32()),
            field("position", pa.int32(), "index, in the unpadded sequence, of the position that predicts the token"),
            field("log_prob", pa.float32(), "nat"),
            field("neurons", pa.list_(NEURON_ENTRY), SCORE),
        ]
    ),
    "rankings": pa.schema(
        [
            field("concept", pa.string()),
            field("rank", pa.int32(), "from 1, by score"),
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("score", pa.float64(), SCORE),
            field("score_std", pa.float64(), SCORE),
            field("specific", pa.float64(), SCORE),
            field("specific_rank", pa.int32(), "from 1, by specific"),
            field("n", pa.int64(), "occurrences"),
            field("share", pa.float64(), "part of occurrences, 0 to 1"),
            field("activation", pa.float64(), ACTIVATION),
            field(
                "tokens",
                pa.list_(pa.string()),
                "the ten it writes here, highest first: where its mean activation is "
                "negative, those that it suppresses",
            ),
            field("certified", pa.bool_(), "whether its rank by score is certain, whatever shards left out"),
            field("selective", pa.float64(), SCORE),
            field("selective_rank", pa.int32(), "from 1, by selective"),
            field("n_images", pa.int64(), "different images among the occurrences"),
            field("certified_specific", pa.bool_(), "whether its rank by specific is"),
            field("certified_selective", pa.bool_(), "whether its rank by selective is"),
            field("exact", pa.bool_(), EXACT),
        ]
    ),
    "neurons": pa.schema(
        [
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("neuron", pa.string()),
            field("n_concepts", pa.int32(), "concepts in whose top_k by score it is"),
            field("n_tokens", pa.int64(), COUNT),
            field("n_active", pa.int64(), "tokens at which the gate is open"),
            field("mean", pa.float64(), ACTIVATION),
            field("std", pa.float64(), ACTIVATION),
            field("max", pa.float32(), ACTIVATION),
            field("min", pa.float32(), ACTIVATION),
            field("tokens", pa.list_(pa.string()), "the ten it promotes most, highest first"),
            field("suppressed", pa.list_(pa.string()), "the ten it suppresses most, lowest first"),
        ]
    ),
    "activity": pa.schema(
        [
            field("label_kind", pa.string()),
            field("label", pa.string()),
            field("modality", pa.string(), "image or text"),
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("n_tokens", pa.int64(), COUNT),
            field("n_active", pa.int64(), "tokens at which the gate is open"),
            field("sum", pa.float64(), ACTIVATION),
            field("sum_squares", pa.float64(), "activation squared"),
            field("module", pa.string(), "language, or what --module adds"),
        ]
    ),
    "examples": pa.schema(
        [
            field("layer", pa.int16()),
            field("unit", pa.int32()),
            field("sign", pa.int8(), "+1 highest, -1 lowest"),
            field("rank", pa.int16(), "from 1"),
            field("sample_id", pa.string()),
            field("position", pa.int32(), "index in the unpadded sequence"),
            field("activation", pa.float32(), ACTIVATION),
        ]
    ),
    "errors": pa.schema(
        [
            field("sample_id", pa.string()),
            field("source", pa.string()),
            field("shard_id", pa.int32()),
            field("stage", pa.string()),
            field("message", pa.string()),
        ]
    ),
}
"""The tables that a finished run offers to its readers."""


PART_SCHEMAS: dict[str, pa.Schema] = {
    "captions": SCHEMAS["captions"],
    "occurrences": SCHEMAS["occurrences"],
    "errors": SCHEMAS["errors"],
    # A row is a concept; lists and vectors run over its kept neurons.
    "concepts": pa.schema(
        [
            field("concept", pa.string()),
            field("n", pa.int64(), "occurrences"),
            field("bound", pa.float64(), "largest sum of scores of a neuron that is not kept"),
            field("floor", pa.float64(), "smallest sum of scores of a neuron that is not kept"),
            field("neuron", pa.list_(pa.int32()), "index over all layers; null: all neurons are kept"),
            field("score", pa.large_binary(), "fp64 sum over occurrences"),
            field("score_squares", pa.large_binary(), "fp64 sum of squares over occurrences; null where n is 1"),
            field("activation", pa.large_binary(), "fp32 sum over occurrences"),
        ]
    ),
    # One row: sums over all occurrences of all concepts, a number a neuron.
    "totals": pa.schema(
        [
            field("n", pa.int64(), "occurrences"),
            field("score", pa.list_(pa.float64()), "sum"),
            field("score_squares", pa.list_(pa.float64()), "sum of squares"),
        ]
    ),
    "activity": pa.schema(
        [
            field("label_kind", pa.string()),
            field("label", pa.string()),
            field("modality", pa.string()),
            field("n_tokens", pa.int64()),
            field("n_active", pa.list_(pa.int64())),
            field("sum", pa.list_(pa.float64())),
            field("sum_squares", pa.list_(pa.float64())),
            field("module", pa.string()),
        ]
    ),
    # A row is a sign and rank: the shard's rank-th extreme sample of every neuron.
    "examples": pa.schema(
        [
            field("sign", pa.int8()),
            field("rank", pa.int16()),
            field("sample", pa.list_(pa.int32()), "row of the shard's captions"),
            field("position", pa.list_(pa.int32())),
            field("activation", pa.list_(pa.float32())),
        ]
    ),
    # What every neuron writes, a row a neuron; one such table a run.
    "decoded": pa.schema([field("tokens", pa.list_(pa.string())), field("suppressed", pa.list_(pa.string()))]),
}
"""What one unit of work commits; sums that the merge adds up."""

EVALUATION_FILE, CAPTIONS_FILE = "evaluation.json", "captions.parquet"
"""In an edit's folder: the measures of its last evaluation, and the captions before and after."""

EVALUATION_SCHEMAS: dict[str, pa.Schema] = {
    # A row is a sample's part in one measure; the totals over samples make the measure.
    "measurements": pa.schema(
        [
            field("measure", pa.string()),
            field("sample_id", pa.string()),
            field("image", pa.string(), "key of the image; null: of a question or record"),
            field("before", pa.list_(pa.float64()), "sums; most often what is counted, and of how many"),
            field("after", pa.list_(pa.float64()), "sums; most often what is counted, and of how many"),
        ]
    ),
    "captions": pa.schema(
        [
            field("sample_id", pa.string()),
            field("before", pa.string()),
            field("after", pa.string()),
            field("changed", pa.bool_()),
            field("role", pa.string(), "edited, source, unrelated or other"),
            field("image", pa.string(), "key of the image, which all samples of it share"),
        ]
    ),
    "errors": SCHEMAS["errors"],
}
"""What one unit of work of an evaluation commits."""

ROW_GROUP = 100_000
"""Rows of a row group: many small ones make every later read slow."""
VECTORS_OF_A_PAGE = 16
"""Rows that are written without a look at the size of the page; vectors are up to megabytes, a page 2 GB."""


def to_bytes(table: pa.Table) -> bytes:
    """Return the table as the bytes of one Parquet file."""
    buffer = io.BytesIO()
    if not len(table):
        # No row group, rather than an empty one, which `datasets` takes for an error.
        pq.ParquetWriter(buffer, table.schema).close()
        return buffer.getvalue()
    # Dictionaries, compression and extremes are for text and columns of rows: on long lists of numbers they only cost
    # time.
    texts = [
        name for name, kind in zip(table.schema.names, table.schema.types, strict=True) if pa.types.is_string(kind)
    ]
    sums = any(
        pa.types.is_large_binary(kind) or (pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))
        for kind in table.schema.types
    )
    pq.write_table(
        table,
        buffer,
        compression="none" if sums else "zstd",
        compression_level=None if sums else 1,
        row_group_size=ROW_GROUP,
        use_dictionary=texts,
        write_statistics=not sums,
        write_batch_size=VECTORS_OF_A_PAGE if sums else None,
    )
    return buffer.getvalue()


def from_bytes(data: bytes) -> pa.Table:
    """Return the table that `to_bytes` wrote; raises DamagedError for anything else."""
    # Arrow's threads may outlive the call, and drop its last references. A reference to Python's own bytes that is
    # dropped while Python ends aborts the process, so that Arrow gets memory of its own.
    stream = pa.BufferOutputStream()
    stream.write(data)
    try:
        # Not `read_table`, which goes by way of a data set: that takes longer than a small part itself.
        return _without_maps(pq.ParquetFile(pa.BufferReader(stream.getvalue())).read())
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"no whole Parquet file ({str(error).splitlines()[0]})") from error


def _without_maps(table: pa.Table) -> pa.Table:
    """Return the table as it is written now: runs of version 0.1.0 have maps."""
    for place, column in enumerate(table.schema):
        if pa.types.is_map(column.type):
            entries = table.column(place).cast(pa.list_(LABEL_ENTRY))
            table = table.set_column(place, column.with_type(entries.type), entries)
    return table


def read_table(store: Store, name: str, folder: str = "tables") -> pa.Table:
    """Return a table that lies in a file, or in a folder of numbered files; `FileNotFoundError` where it doesn't.

    Raises DamagedError, which names the file, for one that is cut.
    """
    table = f"{folder}/{name}.parquet"
    # Others may have put files of their own there.
    is_file = re.compile(f"{re.escape(table)}(/[0-9]+[.]parquet)?").fullmatch
    files = [entry.key for entry in store.list(table) if is_file(entry.key)]
    if not files:
        raise FileNotFoundError(f"{store.uri}/{table}")
    return pa.concat_tables([read_file(store, key) for key in files])


def read_file(store: Store, key: str) -> pa.Table:
    """Return the table in a file; raises DamagedError, which names the file, if it is cut."""
    data = store.read(key)
    try:
        return from_bytes(data)
    except DamagedError as error:
        raise DamagedError(f"{store.uri}/{key}: {error}") from error


def list_column(rows: ndarray, kind: pa.DataType) -> pa.ListArray:
    """Return a column whose lists are the rows of a matrix; many times faster than through Python lists."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * np.int32(rows.shape[1])
    values = np.ascontiguousarray(rows).reshape(-1).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def vector_column(rows: ndarray, present: ndarray) -> pa.LargeBinaryArray:
    """Return a column of vectors, whose bytes are written and read twice as fast as a list's numbers.

    `present` tells of each row of the column whether it has a vector, the next row of the matrix; the others are null.
    """
    starts = np.concatenate([[0], np.cumsum(present * rows[:1].nbytes)]).astype(np.int64)
    buffers = [pa.array(present).buffers()[1], pa.py_buffer(starts), pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.large_binary(), len(present), buffers)


def vectors(column: pa.ChunkedArray, dtype: type[np.float64 | np.float32 | np.int32]) -> list[ndarray]:
    """Return the vectors of a column, of which it does not know the number format; a null is an empty one."""
    return [np.frombuffer(value.as_buffer() or b"", dtype) for chunk in column.chunks for value in chunk]


def list_values(column: pa.ChunkedArray) -> list[ndarray]:
    """Return the lists of a column as arrays, without a copy where there are no nulls."""
    arrays: list[ndarray] = []
    for chunk in column.chunks:
        # The values as they lie: `flatten` would go through a kernel, which for short columns takes longest of all.
        values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        arrays.extend(values[start:stop] for start, stop in pairwise(offsets))
    return arrays
