"""Tables of a merge become visible at once, whoever writes them late reads as nobody, and damage is named."""

import pyarrow as pa
import pytest

from mmray.errors import DamagedError, InputError
from mmray.runs import snapshots as module
from mmray.runs.snapshots import KEPT, SnapshotWriter, newest, next_fence, open_snapshot, publish_tables, snapshots
from mmray.runs.tables import from_bytes, read_table
from mmray.storage import Store
from tests.support.stores import Forgetful


def rows(*values: int) -> pa.Table:
    return pa.table({"n": pa.array(values, pa.int64())})


def write(store: Store, lease: int, headline: int = 0, **tables: pa.Table):
    writer = SnapshotWriter(store, "census", lease)
    for name, table in tables.items():
        writer.add(name, table)
    snapshot = writer.commit({"receipts": str(headline)}, {"samples": headline})
    publish_tables(store, snapshot)
    return snapshot


def test_nothing_is_seen_before_the_commit(store: Store) -> None:
    assert newest(store, "census") is None
    writer = SnapshotWriter(store, "census", 1)
    writer.add("a", rows(1))
    assert newest(store, "census") is None
    writer.commit({}, {"samples": 3})
    found = newest(store, "census")
    assert found is not None
    assert (found.number, found.headline) == ("000001-0001", {"samples": 3})
    assert found.read(store, "a") == rows(1)


def test_a_reader_keeps_the_version_that_it_opened(store: Store) -> None:
    write(store, 1, a=rows(1), b=rows(1))
    opened = newest(store, "census")
    assert opened is not None
    write(store, 1, a=rows(2), b=rows(2))
    assert (opened.read(store, "a"), opened.read(store, "b")) == (rows(1), rows(1))
    again = newest(store, "census")
    assert again is not None and again.read(store, "b") == rows(2)


def test_a_driver_that_lost_its_lease_changes_nothing(store: Store) -> None:
    """It was stopped in the middle of its merge, and goes on after its successor is done."""
    late = SnapshotWriter(store, "census", 1)
    late.add("a", rows(1))
    write(store, 2, a=rows(1, 2))
    with pytest.raises(InputError, match="another driver has taken census over"):
        late.commit({}, {})
    found = newest(store, "census")
    assert found is not None and found.read(store, "a") == rows(1, 2)
    assert read_table(store, "a") == rows(1, 2)


def test_a_driver_that_lost_its_lease_removes_nothing_of_its_successor(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins a merge in the middle of the successor's, whose files no snapshot names yet."""
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    died = SnapshotWriter(store, "census", 1)
    died.add("a", rows(7))
    writer = SnapshotWriter(store, "census", 2)
    # What the successor finds is removed, and what it writes stays.
    assert not list(store.list("snapshots/census/000001-0001/"))
    writer.add("a", rows(1))
    SnapshotWriter(store, "census", 1)
    publish_tables(store, writer.commit({}, {}))
    found = newest(store, "census")
    assert found is not None and list(found.verify(store)) == []
    assert found.read(store, "a") == rows(1)


def test_a_commit_whose_answer_was_lost_stands(store: Store) -> None:
    assert write(Forgetful(store), 1, 7, a=rows(1)).number == "000001-0001"
    found = newest(store, "census")
    assert found is not None and found.headline == {"samples": 7}


def test_a_driver_comes_after_those_whose_leases_were_removed(store: Store) -> None:
    assert next_fence(store, "census", 4) == 4
    write(store, 4, a=rows(1))
    assert next_fence(store, "census", 1) == 5
    assert next_fence(store, "census", 9) == 9
    assert next_fence(store, "properties", 1) == 1


def test_a_table_that_is_not_written_again_stays(store: Store) -> None:
    write(store, 1, maps=rows(1), properties=rows(1))
    for number in range(2, 2 + 2 * KEPT):
        write(store, number, properties=rows(number))
    found = newest(store, "census")
    assert found is not None
    assert (found.read(store, "maps"), found.read(store, "properties")) == (rows(1), rows(1 + 2 * KEPT))


def test_the_last_few_stay_and_all_else_goes(store: Store) -> None:
    for number in range(1, KEPT + 3):
        write(store, number, a=rows(number))
    numbers = snapshots(store)["census"]
    assert numbers == [f"{number:06d}-0001" for number in range(KEPT + 2, 2, -1)]
    files = [entry.key for entry in store.list("snapshots/") if entry.key.endswith(".parquet")]
    assert files == [f"snapshots/census/{number}/a/00000.parquet" for number in sorted(numbers)]


def test_other_tools_find_the_newest(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 64)
    large, small = [rows(*range(start, start + 10)) for start in range(0, 50, 10)], rows(7)
    writer = SnapshotWriter(store, "census", 1)
    for part in large:
        writer.add("a", part)
    snapshot = writer.commit({}, {})
    publish_tables(store, snapshot)
    assert len(store.list("tables/a.parquet/")) == len(snapshot.tables["a"]) > 1
    assert read_table(store, "a") == snapshot.read(store, "a") == pa.concat_tables(large)
    write(store, 1, a=small)
    assert read_table(store, "a") == small


def damage(store: Store, key: str) -> None:
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def test_damage_is_named_with_the_command_that_repairs_it(store: Store) -> None:
    snapshot = write(store, 1, a=rows(1), b=rows(2))
    assert list(snapshot.verify(store)) == []
    key = snapshot.tables["a"][0].key
    damage(store, key)
    with pytest.raises(DamagedError) as caught:
        snapshot.read(store, "a")
    assert "\n" not in str(caught.value)
    assert key in str(caught.value) and "run mmray census again" in str(caught.value)
    assert list(snapshot.verify(store)) == [str(caught.value)]
    store.delete(key)
    assert len(list(snapshot.verify(store))) == 1
    store.put(f"{snapshot.folder}.json", b'{"made_from": {}')
    with pytest.raises(DamagedError, match=r"000001-0001\.json: not a snapshot, or a truncated one"):
        open_snapshot(store, "census", snapshot.number)
    assert from_bytes(store.read(snapshot.tables["b"][0].key)) == rows(2)
