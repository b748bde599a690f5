"""An image folder with `metadata.jsonl` or `metadata.csv`, whose rows name the images (Hugging Face's convention)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import ClassVar

from mmray.data import locations
from mmray.data.caption_lists import has_lists, rows_holding
from mmray.data.columns import IMAGE_SUFFIXES, Columns, detect, kinds_of_records
from mmray.data.locations import DataLocation
from mmray.data.rows import Record
from mmray.data.source import DataFile, Source
from mmray.errors import InputError
from mmray.storage import open_store

PEEKED = 16
"""Rows whose values tell what the columns hold."""
CACHED_FILES = 4


@dataclass(frozen=True)
class FolderSource(Source):
    """Metadata files, one row per sample; image names are relative to the metadata's folder."""

    kind: ClassVar[str] = "folder"

    def files(self) -> list[DataFile]:
        """Return the metadata files; sizes and digests include the images in and below their folders."""
        files = []
        for entry in self.location.entries:
            rows = self.samples_in(entry.key, len(lines(self.location.folder, entry.key, entry.version)))
            folder = locations.join(self.location.folder, entry.key.rpartition("/")[0])
            # Names and sizes stand for the images' content: hashing it would read all data.
            images, size = images_digest(image_sizes(folder))
            digest = f"{locations.identity(self.location.folder, entry, whole=True)} {images}"
            whole = hashlib.sha256(digest.encode()).hexdigest()
            files.append(DataFile(entry.key, rows, entry.size + size, whole, self.rows_digest(entry.key, rows)))
        return files

    def rows_digest(self, path: str, rows: int) -> str:
        """Return a digest of the rows of a file's first samples, and of the names and sizes of their images."""
        folder = locations.join(self.location.folder, path.rpartition("/")[0])
        if (starts := self._row_starts(path)) is not None:
            _, rows = rows_holding(starts, 0, rows)
        records = (record for _, record in self.records(path, 0, rows))
        return records_digest(records, str(self.columns.image), image_sizes(folder))

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of one metadata file."""
        parsers = lines(self.location.folder, path, self.entry(path).version)[start:stop]
        yield from ((f"{path}#{row}", parse()) for row, parse in enumerate(parsers, start))


def open_folder(data: str, location: DataLocation, requested: Columns, captions: bool) -> FolderSource:
    """Open metadata files; columns are taken from the first rows of the first file that has any.

    Raises `InputError` if none has rows, a folder has two metadata files, or a column is missing.
    """
    folders = [entry.key.rpartition("/")[0] for entry in location.entries]
    if location.whole and len(set(folders)) < len(folders):
        raise InputError(f"{data}: a folder has both metadata.jsonl and metadata.csv; name the one to read")
    for entry in location.entries:
        rows = (parse() for parse in lines(location.folder, entry.key, entry.version))
        if records := list(islice((row for row in rows if not isinstance(row, str)), PEEKED)):
            where = locations.join(location.folder, entry.key)
            columns = detect(kinds_of_records(records), requested, where, captions)
            lists = has_lists(records, columns) or any(
                _has_list(location.folder, entry.key, columns) for entry in location.entries
            )
            return FolderSource(data, location, columns, captions, caption_lists=lists)
    raise InputError(f"{data}: no row of the metadata can be read; each needs a file_name and a caption")


def _has_list(folder: str, key: str, columns: Columns) -> bool:
    """Return whether any caption of a JSON lines file is a list.

    The whole file is searched, because the first list may be far down; as bytes, because parsing takes long.
    """
    start = rb"%s\s*:\s*\[" % re.escape(json.dumps(columns.caption).encode())
    return key.lower().endswith(".jsonl") and re.search(start, locations.read(folder, key) or b"") is not None


def image_sizes(folder: str) -> dict[str, int]:
    """Return the sizes in bytes of the images in and below a folder, by their names."""
    entries = open_store(folder).list()
    return {entry.key: entry.size for entry in entries if entry.key.rpartition(".")[2].lower() in IMAGE_SUFFIXES}


def images_digest(sizes: Mapping[str, int]) -> tuple[str, int]:
    """Return a digest of images' names and sizes, and their total bytes."""
    digest = hashlib.sha256()
    for name, size in sizes.items():
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest(), sum(sizes.values())


def records_digest(records: Iterable[Record], image: str, sizes: Mapping[str, int]) -> str:
    """Return a digest of rows, and of the sizes of the images that column `image` names."""
    digest = hashlib.sha256()
    for record in records:
        size = None if isinstance(record, str) else sizes.get(str(record.get(image)))
        # ASCII JSON: a lone surrogate, which JSON can spell, could not be encoded as UTF-8.
        digest.update(json.dumps([record, size], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@lru_cache(maxsize=CACHED_FILES)
def lines(folder: str, key: str, version: str) -> tuple[Callable[[], Record], ...]:
    """Return a parser for each row of a metadata file. Parsed rows would take several times the file's memory."""
    content = locations.read(folder, key)
    if content is None:
        raise InputError(f"{locations.join(folder, key)}: gone; check the path")
    if key.lower().endswith(".csv"):
        return tuple(_csv_rows(content))
    return tuple(partial(_json_row, line) for line in content.splitlines() if line.strip())


def _json_row(line: bytes) -> Record:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    return row if isinstance(row, dict) else f"{type(row).__name__} where a JSON object was expected"


def _csv_rows(content: bytes) -> Iterator[Callable[[], Record]]:
    # Bytes that are not UTF-8 become lone surrogates; rows that use them as text fail one by one.
    # `utf-8-sig` drops the byte order mark that spreadsheets write.
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig", errors="surrogateescape"), newline=""))
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield partial(str, f"not CSV ({error})")
            continue
        if header is None:
            header = cells
        elif cells:
            yield partial(_csv_row, header, cells)


def _csv_row(header: list[str], cells: list[str]) -> Record:
    if len(cells) != len(header):
        return f"{len(cells)} cells under {len(header)} columns"
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}
