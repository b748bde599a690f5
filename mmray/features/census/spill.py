"""Rows of many shards, regrouped by ranges of a key on the driver's disk: an external sort in one pass.

The sums of all concepts do not fit in memory, but those of a range of concepts do.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import InputError
from mmray.storage import is_full

SPILLED = 128 << 20
"""Bytes collected in memory before they are written; large, so that a range is read in few pieces."""


class ScratchFile:
    """A temporary file without a name, for one spill after another: fresh pages of a file take longer than old ones."""

    def __init__(self) -> None:
        self._file: Any = None

    def __del__(self) -> None:
        """Close it."""
        self.close()

    def rewound(self) -> Any:
        """Return the file at its beginning, with what was written before."""
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Free its space."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Spill:
    """Tables that are added shard by shard, and read range by range; rows of one key stay in the order of shards.

    `cuts` are the keys at which a new range starts. Little data stays in memory. The file has no name, so that nothing
    is left of a merge that is killed. `scratch` may serve other spills once nothing of this one is needed any more.
    """

    def __init__(self, schema: pa.Schema, cuts: Sequence[Any], scratch: ScratchFile | None = None) -> None:
        self.schema = schema
        self.cuts = cuts
        self._pending: list[tuple[pa.Table, list[int]]] = []
        self._bytes = 0
        self._flushes = 0
        self._scratch, self._is_shared = scratch or ScratchFile(), scratch is not None
        self._file: Any = None
        self._writer: Any = None

    def add(self, rows: pa.Table, key: str) -> None:
        """Add a shard's rows, in any order of their key."""
        order = pc.sort_indices(rows[key])  # stable
        if not np.array_equal(order, np.arange(len(rows))):
            rows = rows.take(order)
        # Parts committed by an earlier version may lack a newer column, which is then filled with nulls. Not once per
        # range: there are hundreds.
        if rows.schema != self.schema:
            rows = pa.concat_tables([self.schema.empty_table(), rows], promote_options="default")
        edges = np.searchsorted(rows[key].to_numpy(), self.cuts).tolist() if self.cuts else []
        self._pending.append((rows, [0, *edges, len(rows)]))
        self._bytes += rows.nbytes
        if self._bytes >= SPILLED and self.cuts:
            with room_for("a merge's sums"):
                self._flush()

    def ranges(self) -> Iterator[pa.Table]:
        """Yield the rows of each range, once; ranges in order of their keys."""
        if self._writer is None:
            yield from (self._collected(number) for number in range(len(self.cuts) + 1))
            return
        self._flush()
        self._writer.close()
        self._file.flush()
        size = self._file.tell()
        for number in range(len(self.cuts) + 1):
            # Not read but mapped, which copies nothing; anew for each range, to use no memory for those before it.
            mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            places = range(number, self._flushes * (len(self.cuts) + 1), len(self.cuts) + 1)
            yield pa.Table.from_batches([reader.get_batch(place) for place in places])
        if not self._is_shared:
            self._scratch.close()

    def _collected(self, number: int) -> pa.Table:
        """Return what is in memory of a range."""
        slices = [rows.slice(edges[number], edges[number + 1] - edges[number]) for rows, edges in self._pending]
        return pa.concat_tables([self.schema.empty_table(), *slices])

    def _flush(self) -> None:
        """Write what is in memory: one record batch per range."""
        if self._writer is None:
            self._file = self._scratch.rewound()
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self.schema)
        # An empty range is written, too: the place of a batch says which range it is of.
        empty = pa.RecordBatch.from_pylist([], schema=self.schema)
        for number in range(len(self.cuts) + 1):
            self._writer.write_batch(next(iter(self._collected(number).combine_chunks().to_batches()), empty))
        self._flushes += 1
        self._pending, self._bytes = [], 0


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Name the folder of temporary files if a write inside the block fills its disk."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        folder = tempfile.gettempdir()
        raise InputError(f"{folder}: no room for {what}; set TMPDIR to a folder with more") from error


def cuts_of(keys: Sequence[Any], ranges: int) -> list[Any]:
    """Return the keys that cut a sample of keys into so many ranges of about equal size, each a different key."""
    ordered = sorted(keys)
    found = {ordered[len(ordered) * number // ranges] for number in range(1, ranges)} if ordered else set()
    return sorted(found)
