"""The base of every source: its files, their rows as samples, and the names of its objects."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from mmray.data import locations
from mmray.data.caption_lists import RowStarts, parse_lists, row_starts, rows_holding, split_captions
from mmray.data.columns import Columns
from mmray.data.locations import DataLocation
from mmray.data.rows import BadRowError, Record, object_names, references, samples
from mmray.data.samples import Failure, Sample
from mmray.errors import InputError
from mmray.storage import Entry

TRANSLATIONS = "concepts.json"
CACHED_FILES = 16


@dataclass(frozen=True)
class DataFile:
    """One file of the data: its path below the data's folder, its samples, its size in bytes, and its content digest.

    A file whose rows can't be counted has one row, a failure. The digest is

    - on S3 the ETag, and for a local Parquet file or tar the SHA-256 of its size and its first and last MiB;
    - for metadata and COCO files the SHA-256 of the content (on S3 the ETag) and of the images' names and sizes;
    - for `hf:` the fingerprint from `datasets`.

    `rows_digest` covers the rows and their images in formats whose files may grow; in others it is empty.
    """

    path: str
    rows: int
    """Its samples: its rows, or the captions of rows that hold lists of captions."""
    size: int
    digest: str
    rows_digest: str = ""


@dataclass(frozen=True)
class Source(ABC):
    """Image-caption data. A format adds how its files give records."""

    kind: ClassVar[str]
    """Name in FORMATS."""

    data: str
    """DATA as the user wrote it."""
    location: DataLocation
    columns: Columns
    captions: bool
    """Whether every sample needs a caption."""
    caption_lists: bool = field(default=False, kw_only=True)
    """Whether the caption column holds lists."""

    @abstractmethod
    def files(self) -> list[DataFile]:
        """Return the files in a fixed order. Samples are counted without reading images."""

    @abstractmethod
    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of one file as (where it was read, record)."""

    def object_cells(self) -> Iterable[Any]:
        """Yield the cells of the objects column, which must exist. Images are not read."""
        objects = replace(self, columns=Columns(objects=self.columns.objects))
        for entry in self.location.entries:
            for _, record in objects.records(entry.key, 0, sys.maxsize):
                if not isinstance(record, str):
                    yield record.get(str(self.columns.objects))

    def annotations(self) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield each row's cell of the objects column and all captions of its image; images are not read.

        The cell is None without such a column; captions are empty unless the rows hold lists. Without either, nothing
        is yielded.
        """
        if not self.caption_lists:
            yield from ((cell, ()) for cell in (self.object_cells() if self.columns.objects is not None else ()))
            return
        narrow = replace(self, columns=Columns(caption=self.columns.caption, objects=self.columns.objects))
        for file in self.files():
            for _, record in parse_lists(narrow.records(file.path, 0, sys.maxsize), narrow.columns):
                if not isinstance(record, str):
                    yield record.get(str(narrow.columns.objects)), references(record.get(str(narrow.columns.caption)))

    def rows_digest(self, path: str, rows: int) -> str:
        """Return a digest of a file's first rows and of their images' names and sizes; empty if files can't grow."""
        return ""

    def fetch(self, path: str, names: list[str]) -> list[bytes | str]:
        """Return the images that a file's rows name, as bytes or the reason why not. Names are below its folder."""
        return locations.fetch(locations.join(self.location.folder, path.rpartition("/")[0]), names)

    def entry(self, path: str) -> Entry:
        """Return a file's entry as it was when the source was opened; raises `InputError` for an unknown path."""
        for entry in self.location.entries:
            if entry.key == path:
                return entry
        raise InputError(f"{self.data}: no file {path!r}; the data has changed since the run began")

    def read(self, path: str, start: int, stop: int) -> Iterator[Sample | Failure]:
        """Yield samples `start` to `stop` (exclusive) of one file, bad rows as `Failure`; none past the file's end."""
        starts = self._row_starts(path)
        if starts is None:
            records = self.records(path, start, stop)
            if self.caption_lists:
                records = parse_lists(records, self.columns)
        else:
            rows = self.records(path, *rows_holding(starts, start, stop))
            records = split_captions(rows, self.columns, starts, start, stop)
        return samples(records, self.columns, self.captions, lambda names: self.fetch(path, names))

    def cells(self, names: Sequence[str], path: str, start: int, stop: int) -> Iterator[Record]:
        """Yield the rows that hold these samples of one file, with only these columns; a bad row as the reason.

        Images are not read. A row with several captions is yielded once, whichever of its samples are in the range.
        """
        if (starts := self._row_starts(path)) is not None:
            start, stop = rows_holding(starts, start, stop)
        narrow = replace(self, columns=Columns(labels=tuple(names)))
        return (record for _, record in narrow.records(path, start, stop))

    def samples_in(self, path: str, rows: int) -> int:
        """Return how many samples a file's rows give: each caption of a list is one."""
        starts = self._row_starts(path)
        return rows if starts is None else int(starts[-1])

    def image_end(self, path: str, sample: int) -> int:
        """Return the first sample of a file, from this one on, that is not of the same image as the one before it.

        The sample itself where that takes reading images.
        """
        starts = self._row_starts(path)
        if starts is None or sample >= starts[-1]:
            return sample
        return int(starts[np.searchsorted(starts, sample)])

    def _row_starts(self, path: str) -> RowStarts | None:
        return _cached_row_starts(self, path) if self.caption_lists and self.captions else None

    def objects_vocabulary(self) -> tuple[str, ...]:
        """Return the distinct names in the objects column, sorted; empty without such a column."""
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
        """Return concept → language → form, from a `concepts.json` next to the data; empty without one.

        Raises `InputError` unless it is a list of `{"concept": name, "names": {language: form}}`.
        """
        content = locations.read(self.location.folder, TRANSLATIONS)
        if content is None:
            return {}
        try:
            return {entry["concept"]: dict(entry["names"]) for entry in json.loads(content)}
        except (ValueError, KeyError, TypeError) as error:
            where = locations.join(self.location.folder, TRANSLATIONS)
            form = '[{"concept": NAME, "names": {LANGUAGE: FORM}}]'
            raise InputError(
                f"{where}: not of the form {form} ({type(error).__name__}: {error}); fix or move it"
            ) from error


@lru_cache(maxsize=CACHED_FILES)
def _cached_row_starts(source: Source, path: str) -> RowStarts:
    # Only the caption column: counting must not read a single image.
    column = str(source.columns.caption)
    records = replace(source, columns=Columns(caption=column)).records(path, 0, sys.maxsize)
    return row_starts((record for _, record in records), column)
