"""Commits of a shard, and what must hold of them whatever happens."""

from pathlib import Path

import pyarrow as pa

from mmray.features.census.tables import PARTS
from mmray.runs import RunFolder
from mmray.storage import LocalStore, Store
from tests.support.stores import Killed, Mortal


def tables(mark: str = "s0") -> dict[str, pa.Table]:
    """Parts of a shard with one sample, named by the mark."""
    made = {name: schema.empty_table() for name, schema in PARTS.items() if name != "decoded"}
    caption = {"sample_id": mark, "caption": "A dog.", "source": "dataset", "shard_id": 0}
    made["captions"] = pa.Table.from_pylist([caption], schema=PARTS["captions"])
    return made


def info(fingerprint: str = "f", **settings: object) -> dict[str, object]:
    return {"fingerprint": fingerprint, "result_settings": settings, "digests": {"data": "d", "model": "m"}}


def check_any_death(kind: type[RunFolder], root: Path) -> None:
    """Kill a worker before each of its changes; what it left must not show, and another must be able to finish."""
    for change in range(20):
        store = LocalStore(root / f"death-{change}")
        try:
            kind(Mortal(store, change)).commit_shard(0, tables(), 1, 1.0)
            died = False
        except Killed:
            died = True
        folder = kind(store)
        before = folder.receipt(0)
        assert (before is None) == died
        receipt = before or folder.commit_shard(0, tables(), 1, 2.0)
        assert folder.receipts() == {0: receipt}
        for name, table in tables().items():
            assert folder.read_part(receipt, name).equals(table)
        if not died:
            assert change == len(tables()) + 1
            return
    raise AssertionError("the worker never came to its end")


def check_late_worker(kind: type[RunFolder], store: Store) -> None:
    """Let a worker that was given up for dead commit after another; the first one's shard must stand."""
    folder = kind(store)
    first = folder.commit_shard(0, tables("first"), 1, 1.0)
    receipt = store.read("receipts/000000.json")
    late = folder.commit_shard(0, tables("late"), 1, 2.0)
    assert late == first
    assert store.read("receipts/000000.json") == receipt
    assert folder.read_part(folder.receipts()[0], "captions")["sample_id"].to_pylist() == ["first"]
    assert first.parts is not None
    assert sorted(entry.key for entry in store.list("shards/000000/")) == sorted(first.parts.values())
