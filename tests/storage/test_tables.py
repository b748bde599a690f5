"""Parquet bytes become tables without a thread that outlives the call holding on to Python's memory."""

import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from mmray.errors import DamagedError
from mmray.storage import Checksum, Store
from mmray.tables import from_bytes, read_table, to_bytes


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


def test_files_of_a_table_are_those_that_were_written(store: Store) -> None:
    data = to_bytes(table())
    keys = [f"tables/x.parquet/{number:05d}.parquet" for number in range(2)]
    known = {key: Checksum.of(data) for key in keys} | {"tables/xy.parquet": Checksum.of(b"")}
    for key in keys:
        store.put(key, data)
    store.put("tables/x.parquet/.DS_Store", b"\x00")
    assert len(read_table(store, "x", checksums=known)) == 10_000
    store.put("tables/x.parquet/00002.parquet", data)
    with pytest.raises(DamagedError, match="3 files instead of 2"):
        read_table(store, "x", checksums=known)
    store.delete("tables/x.parquet/00002.parquet")
    store.put(keys[1], to_bytes(table().slice(1)))
    with pytest.raises(DamagedError, match=r"00001\.parquet: .* bytes instead of"):
        read_table(store, "x", checksums=known)
