"""A sweep removes what nobody can need any more, and nothing else."""

import os
from pathlib import Path

import pytest

from mmray.errors import InputError
from mmray.runs import RunFolder
from mmray.runs.lease import hold_lease
from mmray.runs.snapshots import SnapshotWriter
from mmray.runs.sweep import sweep
from mmray.storage import LocalStore, Store
from tests.support.commits import info, tables
from tests.support.stores import Killed, Mortal


def begun(store: Store) -> RunFolder:
    folder = RunFolder(store)
    folder.begin(info(), b"manifest")
    folder.commit_shard(0, tables("first"), 1, 1.0)
    return folder


def die_in_commit(store: Store, shard_id: int) -> None:
    """Leave the parts of an attempt whose worker was killed before the receipt."""
    with pytest.raises(Killed):
        RunFolder(Mortal(store, len(tables()))).commit_shard(shard_id, tables("dead"), 1, 1.0)


def contents(store: Store) -> dict[str, bytes]:
    return {entry.key: store.read(entry.key) for entry in store.list() if not entry.key.startswith("lease/")}


def test_a_run_without_orphans_is_left_as_it_is(store: Store) -> None:
    folder = begun(store)
    before = contents(store)
    swept = sweep(folder, grace=0)
    assert (swept.objects, swept.bytes, swept.young) == (0, 0, 0)
    assert contents(store) == before


def test_parts_that_came_too_late_go_at_once(store: Store) -> None:
    folder = begun(store)
    before = contents(store)
    die_in_commit(store, 0)
    extra = {key: data for key, data in contents(store).items() if key not in before}
    swept = sweep(folder)
    assert (swept.objects, swept.young) == (len(tables()), 0)
    assert swept.bytes == sum(map(len, extra.values()))
    assert contents(store) == before


def test_parts_of_a_shard_that_may_yet_be_committed_have_an_hour(store: Store) -> None:
    folder = begun(store)
    before = contents(store)
    die_in_commit(store, 1)
    left = contents(store)
    swept = sweep(folder)
    assert (swept.objects, swept.young) == (0, len(tables()))
    assert contents(store) == left
    assert sweep(folder, grace=-5).objects == len(tables())
    assert contents(store) == before
    # And the shard is committed as ever.
    receipt = folder.commit_shard(1, tables("second"), 1, 1.0)
    assert folder.read_part(receipt, "captions")["sample_id"].to_pylist() == ["second"]


def test_half_written_files_and_probes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    folder = begun(store)
    before = contents(store)
    for name in ("shards/000000/.tmp-abc", "tables/.tmp-def", ".mmray-check-x"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    (tmp_path / "shards" / ".tmp-just-now").write_bytes(b"half")
    swept = sweep(folder)
    assert (swept.objects, swept.bytes, swept.young) == (3, 12, 1)
    assert contents(store) == before
    assert (tmp_path / "shards" / ".tmp-just-now").exists()


def test_a_run_at_work_is_not_swept(store: Store) -> None:
    folder = begun(store)
    die_in_commit(store, 0)
    before = contents(store)
    with hold_lease(store), pytest.raises(InputError, match="another driver is at work"):
        sweep(folder, grace=0)
    assert contents(store) == before


def test_notes_on_attempts_at_what_is_committed_go(store: Store) -> None:
    folder = begun(store)
    before = contents(store)
    folder.attempt(0)
    folder.quarantine(0, 1, "given up")
    kept = f"attempts/{1:06d}/{folder.attempt(1)}"
    assert sweep(folder).objects == 2
    assert contents(store) == before | {kept: store.read(kept)}


def test_files_of_a_merge_that_was_killed_go_after_an_hour(store: Store) -> None:
    folder = begun(store)
    writer = SnapshotWriter(store, "census", 1)
    writer.add("captions", tables()["captions"])
    writer.commit({}, {})
    before = contents(store)
    killed = SnapshotWriter(store, "census", 2)
    killed.add("captions", tables()["captions"])
    killed.tables["captions"].close()
    assert (sweep(folder).objects, sweep(folder).young) == (0, 1)
    assert sweep(folder, grace=-5).objects == 1
    assert contents(store) == before
