"""Rows come back by ranges of their key, in the order in which they were added, whether or not they were written."""

from itertools import pairwise
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import InputError
from mmray.features.census import spill
from mmray.features.census.spill import ScratchFile, Spill, cuts_of
from tests.support.stores import FullFile

SCHEMA = pa.schema([("key", pa.string()), ("values", pa.list_(pa.int32()))])
ROWS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.none() | st.lists(st.integers(0, 9), max_size=3)), max_size=9)


@given(st.lists(ROWS, max_size=6), st.lists(st.sampled_from("abcdefgh"), unique=True).map(sorted), st.integers(1, 400))
def test_rows_come_back_by_range_in_the_order_of_shards(shards, cuts, spilled):
    with patch.object(spill, "SPILLED", spilled):
        collected = Spill(SCHEMA, cuts)
        for rows in shards:
            collected.add(
                pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA), "key"
            )
        found = [[tuple(row.values()) for row in part.to_pylist()] for part in collected.ranges()]
    everything = [row for rows in shards for row in rows]
    assert len(found) == len(cuts) + 1
    for part, (first, end) in zip(found, pairwise(["", *cuts, "z"]), strict=True):
        assert sorted({key for key, _ in part}) == sorted({key for key, _ in everything if first <= key < end})
        for name in {key for key, _ in part}:
            assert [row for row in part if row[0] == name] == [row for row in everything if row[0] == name]


@given(st.lists(ROWS, min_size=2, max_size=6), st.integers(1, 400))
def test_a_file_that_others_have_written_serves_again(parts, spilled):
    scratch = ScratchFile()
    with patch.object(spill, "SPILLED", spilled):
        for rows in sorted(parts, key=len, reverse=True):
            found = []
            for file in (scratch, None):
                collected = Spill(SCHEMA, ["c", "f"], file)
                table = pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], SCHEMA)
                collected.add(table, "key")
                found.append([part.to_pylist() for part in collected.ranges()])
            assert found[0] == found[1]


def test_little_data_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    collected = Spill(SCHEMA, ["c"])
    collected.add(pa.table({"key": ["d", "a"], "values": [[1], None]}, schema=SCHEMA), "key")
    assert [part["key"].to_pylist() for part in collected.ranges()] == [["a"], ["d"]]


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", FullFile)
    monkeypatch.setattr(spill, "SPILLED", 1)
    collected = Spill(SCHEMA, ["c"])
    with pytest.raises(InputError, match="no room for a merge's sums; set TMPDIR"):
        collected.add(pa.table({"key": ["d", "a"], "values": [[1], None]}, schema=SCHEMA), "key")


@given(st.lists(st.sampled_from("abcdefgh")), st.integers(0, 12))
def test_cuts_divide_keys_into_similar_parts(keys, ranges):
    cuts = cuts_of(keys, ranges)
    assert cuts == sorted(set(cuts))
    assert set(cuts) <= set(keys)
    assert len(cuts) < max(1, ranges)


def test_keys_that_all_differ_are_cut_evenly() -> None:
    assert cuts_of(range(100), 4) == [25, 50, 75]
