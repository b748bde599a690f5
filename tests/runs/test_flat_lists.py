"""Lists of equal length go through flat columns and come back as they were; others stay nested."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.runs.flat_lists import FEWEST, NUMBERS, flat_bytes, read_flat
from mmray.runs.tables import from_bytes, list_column, part_to_bytes, to_bytes

ROWS = 6
LENGTH = FEWEST // ROWS + 1


def parts(present: list[list[bool]], kinds: list[pa.DataType], length: int = LENGTH) -> pa.Table:
    """Return a table with a name per row and a column of lists of each type, null where not present."""
    random, columns = np.random.default_rng(0), {"name": pa.array([f"row {n}" for n in range(ROWS)])}
    for number, (own, kind) in enumerate(zip(present, kinds, strict=True)):
        values = random.integers(-9, 9, (sum(own), length)) * (1 if number % 2 else 0.5)
        columns[f"list {number}"] = list_column(values, pa.list_(kind), np.array(own))
    schema = pa.schema(
        [pa.field(name, column.type, metadata={"unit": name}) for name, column in columns.items()],
        metadata={"order": "name"},
    )
    return pa.table(columns, schema=schema)


column = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)


@given(st.lists(column, min_size=1, max_size=3).filter(lambda some: any(map(any, some))), st.data())
def test_a_table_comes_back_with_its_nulls_and_its_metadata(present: list[list[bool]], data: st.DataObject) -> None:
    kinds = [data.draw(st.sampled_from(NUMBERS)) for _ in present]
    whole = parts(present, kinds)
    for table in (whole, pa.concat_tables([whole.slice(0, 2), whole.slice(2)]), pa.concat_tables([whole, whole])[3:9]):
        written = part_to_bytes(table)
        assert read_flat(pq.ParquetFile(io.BytesIO(written))) is not None or not any(
            table[name].null_count < len(table) for name in table.column_names[1:]
        )
        read = from_bytes(written)
        assert read.equals(table)
        assert read.schema.equals(table.schema, check_metadata=True)
        assert [field.metadata for field in read.schema] == [field.metadata for field in table.schema]


def test_flat_columns_are_hardly_larger() -> None:
    random = np.random.default_rng(1)
    numbers = random.normal(size=(8, 30_000)).astype(np.float32)
    rising = np.sort(random.integers(0, 350_000, (8, 30_000)), axis=1)
    table = pa.table(
        {"x": list_column(numbers, pa.list_(pa.float32())), "n": list_column(rising, pa.list_(pa.int32()))}
    )
    assert len(flat_bytes(table) or b"") < 1.12 * len(to_bytes(table))


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": [[1.0] * FEWEST, [2.0]]}),
        pa.table({"x": [[1.0] * 10] * 10}),
        pa.table({"x": [["a"] * FEWEST]}),
        pa.table({"x": [1.0] * FEWEST}),
        pa.table({"x": list_column(np.zeros((2, FEWEST)), pa.list_(pa.float32()))})[:0],
        pa.table({"x": pa.nulls(FEWEST, pa.list_(pa.float32()))}),
    ],
    ids=["ragged", "short", "of text", "no lists", "empty", "all null"],
)
def test_other_tables_stay_as_they_are(table: pa.Table) -> None:
    assert flat_bytes(table) is None
    assert part_to_bytes(table) == to_bytes(table)
    assert from_bytes(part_to_bytes(table)).equals(table)
