"""Ways to commit a shard that are broken on purpose: a test of durability has to fail with each of them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from mmray.runs import Receipt, RunFolder
from mmray.runs.tables import from_bytes, to_bytes


class ReceiptFirst(RunFolder):
    """Says that a shard is done before its parts are there."""

    def commit_shard(self, shard_id: int, tables: dict[str, pa.Table], samples: int, *_: Any, **__: Any) -> Receipt:
        parts = {name: f"shards/{shard_id:06d}/x-{name}.parquet" for name in tables}
        receipt = Receipt(shard_id, samples=samples, occurrences=len(tables.get("occurrences", ())), parts=parts)
        if self.store.commit(f"receipts/{shard_id:06d}.json", json.dumps(asdict(receipt)).encode()):
            for name, table in tables.items():
                self.store.commit(parts[name], to_bytes(table))
        return receipt


class ReceiptReplaced(RunFolder):
    """A later worker's receipt takes the place of an earlier one."""

    def commit_shard(self, shard_id: int, *work: Any, **more: Any) -> Receipt:
        self.store.delete(f"receipts/{shard_id:06d}.json")
        return super().commit_shard(shard_id, *work, **more)


class Appended(RunFolder):
    """Every attempt adds files of its own name to a shard, and whatever is there is read."""

    def read_part(self, receipt: Receipt, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        listed = self.store.list(f"shards/{receipt.shard_id:06d}/")
        ours = [entry.key for entry in listed if entry.key.endswith(f"-{name}.parquet")]
        return pa.concat_tables([from_bytes(self.store.read(key), columns) for key in ours])
