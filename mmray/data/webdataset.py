"""WebDataset tars: samples are counted from member headers and read by offset; nothing is extracted or unpickled."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Any, BinaryIO, ClassVar

from mmray.data import locations
from mmray.data.caption_lists import has_lists
from mmray.data.columns import IMAGE_SUFFIXES, Columns, Kind, detect, kinds_of_records
from mmray.data.images import LARGEST_FILE
from mmray.data.locations import DataLocation
from mmray.data.rows import Record
from mmray.data.source import DataFile, Source
from mmray.errors import InputError
from mmray.storage import Entry, too_large

FIELDS = "json"
"""Suffix of the member whose keys are columns too."""
PEEKED = 16
"""Samples whose members tell what the columns are."""
CACHED_TARS = 16
LARGEST_TEXT = 16 << 20
"""Largest text or JSON member, or header, in bytes; larger ones are refused unread."""


@dataclass(frozen=True)
class Member:
    """One file in a tar: its name before and after the first dot, where its bytes are, and why it is refused."""

    key: str
    suffix: str
    offset: int
    size: int
    refusal: str | None = None


@dataclass(frozen=True)
class Group:
    """The members of one sample, or why the sample is refused."""

    key: str
    members: tuple[Member, ...]
    refusal: str | None = None


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Tars of one folder, in the order of their paths. Adjacent members that share a stem are one sample.

    A column is a suffix (`jpg`, `txt`) or a key of the `json` member. Any image suffix serves as the image column.
    """

    kind: ClassVar[str] = "webdataset"

    def files(self) -> list[DataFile]:
        """Return the tars, samples counted from headers; a tar that is cut short has one bad row more."""

        def describe(entry: Entry) -> DataFile:
            rows = self.samples_in(entry.key, len(groups(self.location.folder, entry.key, entry.version)))
            return DataFile(entry.key, rows, entry.size, locations.identity(self.location.folder, entry))

        return locations.concurrently(describe, self.location.entries)

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield samples of one tar; only the members of needed columns are read."""
        if chosen := groups(self.location.folder, path, self.entry(path).version)[start:stop]:
            with locations.stream(self.location.folder, path) as tar:
                for group in chosen:
                    yield f"{path}#{group.key}", _record(tar, group, self.columns)


def open_webdataset(data: str, location: DataLocation, requested: Columns, captions: bool) -> WebDatasetSource:
    """Open tars; columns are taken from the first samples of the first tar that has any.

    Raises `InputError` if no tar has samples, or a column is missing.
    """
    for entry in location.entries:
        kinds: dict[str, Kind] = {}
        records = []
        with locations.stream(location.folder, entry.key) as tar:
            for group in islice(groups(location.folder, entry.key, entry.version), PEEKED):
                kinds |= {member.suffix: "unknown" for member in group.members if member.suffix != FIELDS}
                kinds |= {suffix: "bytes" for suffix in kinds if suffix in IMAGE_SUFFIXES}
                record = _record(tar, group, requested)
                records += [] if isinstance(record, str) else [record]
        if kinds:
            # Suffixes win over keys of the JSON member, as in `_record`.
            kinds = kinds_of_records(records) | kinds
            # Prefer an image in the tar to a path in the json member.
            image = requested.image or next((suffix for suffix in kinds if suffix in IMAGE_SUFFIXES), None)
            requested = requested.model_copy(update={"image": image})
            columns = detect(kinds, requested, locations.join(location.folder, entry.key), captions)
            lists = has_lists(records, columns)
            return WebDatasetSource(data, location, columns, captions, caption_lists=lists)
    raise InputError(
        f"{data}: no samples in these tars, or damaged ones; each needs members such as 0001.jpg and 0001.txt"
    )


@lru_cache(maxsize=CACHED_TARS)
def groups(folder: str, key: str, version: str) -> tuple[Group, ...]:
    """Return the samples of a tar in order; a tar that is cut short or damaged has one more, which says so."""
    # Headers only: each member's bytes are skipped by seeking.
    members: list[Member] = []
    with locations.stream(folder, key) as file:
        try:
            with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:
                for info in tar:
                    if (member := _member(info)) is not None:
                        members.append(member)
                end = tar.offset
            # `tarfile` takes a damaged header for the end. The real end is two blocks of zeros.
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
            damage = "" if block and not block.strip(b"\0") else f"cut short or damaged at byte {end}"
        except (tarfile.TarError, OSError) as error:
            if locations.is_outage(error):
                raise
            damage = f"cut short or damaged ({error})"
    found = [_group(key, tuple(same)) for key, same in groupby(members, key=lambda member: member.key)]
    return (*found, Group("end", (), f"tar {damage}: what followed is lost")) if damage else tuple(found)


class _Bounded(io.BufferedIOBase):
    """A tar that refuses huge reads: `tarfile` reads an extended header whole, however long it claims to be."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes; raises `tarfile.ReadError` for more than LARGEST_TEXT."""
        if size is None or size > LARGEST_TEXT:
            raise tarfile.ReadError(f"a header of {too_large(size or 0, LARGEST_TEXT)}")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to an offset in the tar."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the offset in the tar."""
        return self.file.tell()


def _member(info: tarfile.TarInfo) -> Member | None:
    path = PurePosixPath(info.name)
    name, _, suffix = path.name.partition(".")
    # Names with two underscores are WebDataset's own metadata.
    if info.isdir() or not name or not suffix or name.startswith("__"):
        return None
    refusal = None
    if path.is_absolute() or ".." in path.parts:
        refusal = f"member {info.name!r} leaves the tar's folder"
    elif not info.isreg():
        refusal = f"member {info.name!r} is a link or a device, not a file"
    elif info.issparse():
        refusal = f"member {info.name!r} is sparse, which is not read"
    return Member(str(path.parent / name), suffix.lower(), info.offset_data, info.size, refusal)


def _group(key: str, members: tuple[Member, ...]) -> Group:
    return Group(key, members, next((member.refusal for member in members if member.refusal), None))


def _record(tar: BinaryIO, group: Group, columns: Columns) -> Record:
    if group.refusal is not None:
        return group.refusal
    record: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    wanted = set(columns.used())
    for member in group.members:
        is_image = member.suffix == columns.image or (
            columns.image in IMAGE_SUFFIXES and member.suffix in IMAGE_SUFFIXES
        )
        if not is_image and member.suffix not in wanted | {FIELDS}:
            continue
        if member.size > (most := LARGEST_FILE if is_image else LARGEST_TEXT):
            return f"member {member.key}.{member.suffix}: {too_large(member.size, most)}"
        tar.seek(member.offset)
        content = tar.read(member.size)
        if len(content) != member.size:
            return f"member {member.key}.{member.suffix} is cut short"
        try:
            if is_image:
                record.setdefault(str(columns.image), content)
            elif member.suffix == FIELDS:
                fields = dict(json.loads(content))
            else:
                record[member.suffix] = content.decode()
        except (ValueError, TypeError, RecursionError) as error:
            return f"member {member.key}.{member.suffix}: {error}"
    # A member of its own takes precedence over a key of the JSON member.
    return fields | record
