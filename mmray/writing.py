"""A run's tables written from parts that come one by one: what is held at once does not grow with the table."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from mmray.derived import TABLES
from mmray.storage import Checksum, Store
from mmray.tables import to_bytes

FILE_BYTES = 64 << 20
"""Size in memory at which a table is cut into a further file: what a writer holds at once, however large the table."""
SMALL_PARTS = 64
"""Parts that are joined as they come: one of a few rows takes more memory for its schema than for these."""


class TableWriter:
    """Writes a run's table, `tables/NAME.parquet`, from parts in order; a large one as a folder of that name."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name
        self.key = f"tables/{name}.parquet"
        self._gathered: list[pa.Table] = []
        self._small: list[pa.Table] = []
        self._bytes = 0
        self._first: bytes | None = None
        self.written: dict[str, Checksum] = {}
        """What each file of the table is, by key, once the writer is closed."""

    def add(self, part: pa.Table) -> None:
        """Take in a part, and write what has come together once it is a file's worth."""
        self._small.append(part)
        self._bytes += part.nbytes
        if len(self._small) == SMALL_PARTS:
            self._join_small()
        if self._bytes >= FILE_BYTES:
            self._flush()

    def close(self) -> None:
        """Write the rest, and remove files of an earlier and larger table."""
        if self._bytes or self._first is None:
            self._flush()
        if self._first is not None and not self.written:
            # A folder of that name stays one: a local file can't take its place.
            self._put(f"{self.key}/{0:05d}.parquet" if self.store.list(f"{self.key}/") else self.key, self._first)
        for entry in self.store.list(self.key):
            if entry.key not in self.written:
                self.store.delete(entry.key)

    def _join_small(self) -> None:
        # A part of an earlier version may lack a column that has come since.
        whole = pa.concat_tables([TABLES[self.name].empty_table(), *self._small], promote_options="default")
        self._gathered.append(whole.combine_chunks())
        self._small = []

    def _flush(self) -> None:
        self._join_small()
        data = to_bytes(pa.concat_tables(self._gathered))
        self._gathered, self._bytes = [], 0
        if self._first is None:
            # Whether it is the only one is not known yet, and its name depends on that.
            self._first = data
            return
        if not self.written:
            self.store.delete(self.key)
            self._put(f"{self.key}/{0:05d}.parquet", self._first)
        self._put(f"{self.key}/{len(self.written):05d}.parquet", data)

    def _put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)
        self.written[key] = Checksum.of(data)


def write_table(store: Store, name: str, parts: Iterable[pa.Table]) -> dict[str, Checksum]:
    """Write a run's table from parts in order, and return what its files are."""
    writer = TableWriter(store, name)
    for part in parts:
        writer.add(part)
    writer.close()
    return writer.written
