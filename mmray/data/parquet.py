"""Parquet files: rows are counted from footers and read by row group, with only the needed columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.data import locations
from mmray.data.arrow import kinds_of_schema, records_of
from mmray.data.columns import Columns, detect
from mmray.data.locations import DataLocation
from mmray.data.rows import Record
from mmray.data.source import DataFile, Source
from mmray.errors import InputError
from mmray.storage import Entry, filesystem

ROWS_AT_ONCE = 32
HELD = 128 << 20
"""Bytes that one batch of rows may take."""
SUSPECT, RATIO = 256 << 20, 200
"""A column of a row group is refused as a bomb if it unpacks to more bytes and to more than RATIO times its size."""
NAMES_AT_ONCE = 65536
BUFFER = 4 << 20
"""Bytes per request: a row group is streamed, and read no further than the last row needed."""


class UnreadableError(Exception):
    """A file, or a part of it, that is damaged or gone."""


@dataclass(frozen=True)
class ParquetSource(Source):
    """Parquet files of one folder, in the order of their paths."""

    kind: ClassVar[str] = "parquet"

    def files(self) -> list[DataFile]:
        """Return the files, rows counted from footers; a file without a readable footer counts as one bad row."""

        def describe(entry: Entry) -> DataFile:
            try:
                with _opened(self.location.folder, entry.key) as file:
                    rows: int = file.metadata.num_rows
            except UnreadableError:
                rows = 1
            rows = self.samples_in(entry.key, rows)
            return DataFile(entry.key, rows, entry.size, locations.identity(self.location.folder, entry))

        return locations.concurrently(describe, self.location.entries)

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of one file; in a damaged row group, every row from the damage on becomes the reason."""
        try:
            with _opened(self.location.folder, path) as file:
                first = 0
                for group in range(file.num_row_groups):
                    last = first + file.metadata.row_group(group).num_rows
                    if first < stop and start < last:
                        rows = self._group(file, group, first, max(first, start), min(last, stop))
                        yield from ((f"{path}#{row}", record) for row, record in rows)
                    first = last
        except UnreadableError as error:
            # Such a file was counted as one bad row.
            yield from ((f"{path}#{row}", str(error)) for row in range(start, min(stop, 1)))

    def _group(
        self, file: pq.ParquetFile, group: int, first: int, start: int, stop: int
    ) -> Iterator[tuple[int, Record]]:
        """Yield rows `start` to `stop` (counted in the file) of a row group whose first row is `first`."""
        # Columns are those of the first file; others may lack optional ones.
        names = [name for name in self.columns.used() if name in file.schema_arrow.names]
        row = first
        try:
            at_once = _rows_at_once(file, group, names)
            with _damage(f"row group {group}"):
                # Batches always start at the group's first row, so that damage hits the same rows in every shard.
                for batch in file.iter_batches(at_once, row_groups=[group], columns=names):
                    wanted = batch.slice(max(0, start - row), max(0, stop - max(row, start)))
                    yield from enumerate(records_of(wanted), max(row, start))
                    row += batch.num_rows
                    if row >= stop:
                        return
        except UnreadableError as error:
            yield from ((lost, str(error)) for lost in range(max(row, start), stop))

    def object_cells(self) -> Iterable[Any]:
        """Yield the cells of the objects column; no other column is read."""
        for entry in self.location.entries:
            try:
                with _opened(self.location.folder, entry.key) as file, _damage(entry.key):
                    if self.columns.objects in file.schema_arrow.names:
                        for batch in file.iter_batches(NAMES_AT_ONCE, columns=[self.columns.objects]):
                            yield from batch.column(0).to_pylist()
            except UnreadableError:
                continue  # `read` reports its rows.


def open_parquet(data: str, location: DataLocation, requested: Columns, captions: bool) -> ParquetSource:
    """Open Parquet files; columns are taken from the first readable file.

    Raises `InputError` if no file can be read, or a column is missing.
    """
    reason = ""
    for entry in location.entries:
        try:
            with _opened(location.folder, entry.key) as file:
                kinds = kinds_of_schema(file.schema_arrow)
        except UnreadableError as error:
            where = locations.join(location.folder, entry.key)
            reason = reason or f"{where}: {str(error).removeprefix(f'{entry.key}: ')}"
        else:
            columns = detect(kinds, requested, locations.join(location.folder, entry.key), captions)
            lists = kinds.get(str(columns.caption)) == "texts"
            return ParquetSource(data, location, columns, captions, caption_lists=lists)
    raise InputError(f"{reason}; write or copy it again")


def _rows_at_once(file: pq.ParquetFile, group: int, names: list[str]) -> int:
    """Return how many rows of a group to read at once; raises `UnreadableError` for a decompression bomb."""
    metadata = file.metadata.row_group(group)
    row_size = 0
    for chunk in map(metadata.column, range(metadata.num_columns)):
        name, size = chunk.path_in_schema.partition(".")[0], chunk.total_uncompressed_size
        if name in names:
            packed = chunk.total_compressed_size
            if size > max(SUSPECT, RATIO * packed):
                raise UnreadableError(f"row group {group}: column {name!r} unpacks from {packed:,} to {size:,} bytes")
            # The worst case: with dictionary encoding every row may repeat the column's one large value.
            row_size += size
    return max(1, min(ROWS_AT_ONCE, HELD // max(row_size, 1)))


@contextmanager
def _opened(folder: str, key: str) -> Iterator[pq.ParquetFile]:
    system, path = filesystem(locations.join(folder, key))
    with _damage(key):
        stream = system.open_input_file(path)
    with stream:
        with _damage(key):
            # `pre_buffer` would read a whole row group before its first row.
            file = pq.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False)
        yield file


@contextmanager
def _damage(what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if locations.is_outage(error):
            raise
        raise UnreadableError(f"{what}: unreadable Parquet ({str(error).splitlines()[0]})") from error
