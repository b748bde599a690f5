"""Parquet bytes become tables without a thread that outlives the call holding on to Python's memory."""

import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from mmray.errors import DamagedError
from mmray.runs.tables import from_bytes, read_table, to_bytes
from mmray.storage import Store


def table() -> pa.Table:
    numbers = np.random.default_rng(0).random(5000)
    return pa.table({f"c{n}": numbers if n % 2 else [f"text {m}" for m in range(5000)] for n in range(16)})


@pytest.fixture
def threads() -> Iterator[None]:
    """Let Arrow use threads, however many cores there are."""
    before = pa.cpu_count()
    pa.set_cpu_count(4)
    yield
    pa.set_cpu_count(before)


@pytest.mark.usefixtures("threads")
def test_no_thread_of_arrow_holds_on_to_the_bytes() -> None:
    # One that drops the last reference while Python ends aborts the process: it must not have any.
    content = to_bytes(table())
    late = 0
    for _ in range(100):
        data = bytes(bytearray(content))
        before = sys.getrefcount(data)
        from_bytes(data)
        late += sys.getrefcount(data) != before
    assert late == 0


@pytest.mark.parametrize("data", [b"", b"PAR1", b"x" * 1000, to_bytes(table())[:-100]])
def test_bytes_that_are_no_table_are_told_in_one_line(store: Store, data: bytes) -> None:
    store.put("tables/x.parquet", data)
    with pytest.raises(DamagedError, match=r"tables/x\.parquet: no whole Parquet file \(") as refusal:
        read_table(store, "x")
    assert "\n" not in str(refusal.value)


def test_files_of_others_are_no_part_of_a_table(store: Store) -> None:
    for number in range(2):
        store.put(f"tables/x.parquet/{number:05d}.parquet", to_bytes(table()))
    store.put("tables/x.parquet/.DS_Store", b"\x00")
    store.put("tables/xy.parquet", b"")
    assert read_table(store, "x").equals(pa.concat_tables([table(), table()]))


def test_integers_take_the_bytes_that_they_need() -> None:
    random = np.random.default_rng(0)
    small, rising = random.integers(0, 256, 20_000), np.sort(random.integers(0, 350_000, 20_000))
    for values, most in ((small, 1.05), (rising, 1.1)):
        for kind in (pa.int32(), pa.int64()):
            # Next to floats, as vectors are. An empty list and a null say nothing about the others.
            columns = {
                "n": pa.array([[], None, values], pa.list_(kind)),
                "x": pa.array([[], [], []], pa.list_(pa.float32())),
            }
            whole = pa.table(columns)
            data = to_bytes(whole)
            assert from_bytes(data).equals(whole)
            assert len(data) < most * len(values) + 2_000
