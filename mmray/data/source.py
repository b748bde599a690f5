"""What every source offers: its files, their rows as samples, and the names of its objects."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Protocol

from mmray.data import places
from mmray.data.caption_lists import Starts, lists_in, one_by_one, rows_of, starts_of
from mmray.data.columns import Columns
from mmray.data.places import DataLocation
from mmray.data.rows import BadRowError, Record, object_names, references, samples
from mmray.data.samples import Failure, Sample
from mmray.errors import InputError
from mmray.storage import Entry

TRANSLATIONS = "concepts.json"
CACHED_FILES = 16


@dataclass(frozen=True)
class DataFile:
    """One file of the data: its path below the data's folder, its rows, its size in bytes, what identifies its content.

    The digest costs the same whatever the size. On S3 it is the ETag; for a local Parquet file or tar the SHA-256 of
    its size, first and last MiB; for a metadata or COCO file the SHA-256 of its content (on S3 its ETag) and of the
    names and sizes of the images; for `hf:` the fingerprint that `datasets` gives. A file whose rows cannot be counted
    has one row, a failure. `rows_digest` is that of its rows and their images, of a form of data whose files grow; of
    others it is empty.
    """

    path: str
    rows: int
    """Its samples: rows, or the captions of rows that have a list of them."""
    size: int
    digest: str
    rows_digest: str = ""


class Source(Protocol):
    """Image-caption data, wherever it lies."""

    @property
    def data(self) -> str:
        """The data as the user named it."""

    @property
    def kind(self) -> str:
        """The form of the data: parquet, webdataset, folder, coco or hub."""

    @property
    def columns(self) -> Columns:
        """The columns that are read."""

    def files(self) -> list[DataFile]:
        """Return the files in a fixed order, their rows counted without reading the images."""

    def rows_digest(self, path: str, rows: int) -> str:
        """Return a digest of a file's first rows and of the names and sizes of their images; empty as `DataFile`'s."""

    def read(self, path: str, start: int, stop: int) -> Iterator[Sample | Failure]:
        """Yield rows `start` to `stop` (left out) of one file, a bad row as a `Failure`; none past the file's end."""

    def translations(self) -> dict[str, dict[str, str]]:
        """Return concept → language → form, from a `concepts.json` next to the data; empty without one."""

    def object_cells(self) -> Iterable[Any]:
        """Return the cells of the objects column, which there must be."""

    def cells(self, names: Sequence[str], path: str, start: int, stop: int) -> Iterator[Record]:
        """Yield the rows that hold these samples of one file, with these columns alone; a bad row as the reason.

        Images are not read. A row of several captions is one, whichever of its samples are asked for.
        """

    def annotations(self) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield each row's cell of the objects column, None without one, and all captions of its image, where known."""

    def objects_vocabulary(self) -> tuple[str, ...]:
        """Return the distinct names in the objects column, sorted; empty without such a column."""


@dataclass(frozen=True)
class FileSource(ABC):
    """What sources made of files share; a kind of data adds how its files give records."""

    kind: ClassVar[str]

    data: str
    place: DataLocation
    columns: Columns
    captions: bool
    listed: bool = field(default=False, kw_only=True)
    """Whether the caption column holds lists."""

    @abstractmethod
    def files(self) -> list[DataFile]:
        """Return the files in a fixed order, their samples counted without reading the images."""

    @abstractmethod
    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of one file as (where it was read, record)."""

    @abstractmethod
    def object_cells(self) -> Iterable[Any]:
        """Return the cells of the objects column."""

    def annotations(self) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield each row's cell of the objects column, None without one, and a list of captions; images are not read.

        Nothing where the rows have neither.
        """
        if not self.listed:
            yield from ((cell, ()) for cell in (self.object_cells() if self.columns.objects is not None else ()))
            return
        told = replace(self, columns=Columns(caption=self.columns.caption, objects=self.columns.objects))
        for file in self.files():
            for _, record in lists_in(told.records(file.path, 0, sys.maxsize), told.columns):
                if not isinstance(record, str):
                    yield record.get(str(told.columns.objects)), references(record.get(str(told.columns.caption)))

    def rows_digest(self, path: str, rows: int) -> str:
        """Return a digest of a file's first rows and of the names and sizes of their images; empty as `DataFile`'s."""
        return ""

    def fetch(self, path: str, names: list[str]) -> list[bytes | str]:
        """Return the images that rows of a file name, as bytes or why not: below the file's own folder."""
        return places.fetch(places.join(self.place.folder, path.rpartition("/")[0]), names)

    def entry(self, path: str) -> Entry:
        """Return one file's entry as it was when the source was opened; raises `InputError` for another's path."""
        for entry in self.place.entries:
            if entry.key == path:
                return entry
        raise InputError(f"{self.data}: no file {path!r}; the data has changed since the run began")

    def read(self, path: str, start: int, stop: int) -> Iterator[Sample | Failure]:
        """Yield rows `start` to `stop` (left out) of one file, a bad row as a `Failure`; none past the file's end."""
        starts = self._starts(path)
        if starts is None:
            records = self.records(path, start, stop)
            if self.listed:
                records = lists_in(records, self.columns)
        else:
            rows = self.records(path, *rows_of(starts, start, stop))
            records = one_by_one(rows, self.columns, starts, start, stop)
        return samples(records, self.columns, self.captions, lambda names: self.fetch(path, names))

    def cells(self, names: Sequence[str], path: str, start: int, stop: int) -> Iterator[Record]:
        """Yield rows of one file with these columns alone, images not read; a bad row as the reason."""
        if (starts := self._starts(path)) is not None:
            start, stop = rows_of(starts, start, stop)
        return (record for _, record in replace(self, columns=Columns(labels=tuple(names))).records(path, start, stop))

    def samples_in(self, path: str, rows: int) -> int:
        """Return how many samples a file's rows are: of a list of captions each is one."""
        starts = self._starts(path)
        return rows if starts is None else int(starts[-1])

    def _starts(self, path: str) -> Starts | None:
        return _starts(self, path) if self.listed and self.captions else None

    def objects_vocabulary(self) -> tuple[str, ...]:
        """Return the distinct names in the objects column, sorted; cells that can't be read are passed over."""
        if self.columns.objects is None:
            return ()
        names: set[str] = set()
        for cell in self.object_cells():
            try:
                names.update(object_names(cell) if cell is not None else ())
            except BadRowError:
                continue  # `read` reports this row.
        return tuple(sorted(names))

    def translations(self) -> dict[str, dict[str, str]]:
        """Return concept → language → form, from a `concepts.json` next to the data; empty without one."""
        return read_translations(self.place.folder)


@lru_cache(maxsize=CACHED_FILES)
def _starts(source: FileSource, path: str) -> Starts:
    column = str(source.columns.caption)
    records = replace(source, columns=Columns(caption=column)).records(path, 0, sys.maxsize)
    return starts_of((record for _, record in records), column)


def read_translations(folder: str) -> dict[str, dict[str, str]]:
    """Return concept → language → form from the folder's `concepts.json`; empty without one.

    Raises `InputError` unless it is a list of `{"concept": name, "names": {language: form}}`.
    """
    content = places.read(folder, TRANSLATIONS)
    if content is None:
        return {}
    where = places.join(folder, TRANSLATIONS)
    try:
        return {entry["concept"]: dict(entry["names"]) for entry in json.loads(content)}
    except (ValueError, KeyError, TypeError) as error:
        form = '[{"concept": NAME, "names": {LANGUAGE: FORM}}]'
        raise InputError(
            f"{where}: not of the form {form} ({type(error).__name__}: {error}); fix or move it"
        ) from error
