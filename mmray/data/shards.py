"""The data cut once into numbered shards: a pure function of its files, and every sample in exactly one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mmray.data.samples import Failure, Sample
from mmray.data.source import DataFile, Source
from mmray.engine.clock import timed
from mmray.errors import InputError, ShardError

FORMAT = 1
DUPLICATE = "duplicate"
"""Stage of a failure whose id another row has."""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` (left out) of one file of the data."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """A fixed list of samples, in the order of the data."""

    shard_id: int
    pieces: tuple[Piece, ...]

    @property
    def samples(self) -> int:
        """Number of samples, those that will fail to be read included."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Manifest:
    """The files of the data as they were, and the shards cut from them."""

    files: tuple[DataFile, ...]
    shards: tuple[Shard, ...]

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the files' paths, rows and content digests; not of how they were cut."""
        listed = json.dumps([[file.path, file.rows, file.digest] for file in self.files])
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> bytes:
        """Return the manifest as compact JSON: equal manifests give equal bytes, some 30 bytes a shard."""
        number = {file.path: index for index, file in enumerate(self.files)}
        content = {
            "format": FORMAT,
            "files": [
                [file.path, file.rows, file.size, file.digest, *filter(None, [file.rows_digest])] for file in self.files
            ],
            "shards": [
                [shard.shard_id, *([number[piece.path], piece.start, piece.stop] for piece in shard.pieces)]
                for shard in self.shards
            ],
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Return the manifest that `to_json` wrote; raises `InputError` for anything else."""
        try:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise InputError(f"manifest of format {content['format']}; this mmray reads format {FORMAT}")
            files = tuple(DataFile(*file) for file in content["files"])
            shards = tuple(
                Shard(shard_id, tuple(Piece(files[number].path, start, stop) for number, start, stop in pieces))
                for shard_id, *pieces in content["shards"]
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"not a manifest of shards ({type(error).__name__}: {error})") from error
        return cls(files, shards)


def cut(files: Sequence[DataFile], shard_size: int, limit: int | None = None) -> Manifest:
    """Return the first `limit` samples of `files` (None: all) in shards of `shard_size`, the last one maybe smaller.

    Shards are contiguous and may span files: which samples are in shard n depends on the sequence of samples alone.
    Raises `InputError` unless `shard_size` is at least 1 and `limit` at least 0.
    """
    if shard_size < 1 or (limit is not None and limit < 0):
        raise InputError(
            f"shard size {shard_size}, limit {limit}: a shard holds at least 1 sample, a limit is at least 0"
        )
    left = sum(file.rows for file in files)
    left = left if limit is None else min(left, limit)
    shards: list[Shard] = []
    pieces: list[Piece] = []
    room = shard_size
    for file in files:
        start = 0
        while start < file.rows and left:
            stop = min(file.rows, start + min(room, left))
            pieces.append(Piece(file.path, start, stop))
            room, left, start = room - (stop - start), left - (stop - start), stop
            if not room or not left:
                shards.append(Shard(len(shards), tuple(pieces)))
                pieces, room = [], shard_size
    return Manifest(tuple(files), tuple(shards))


def extend(
    before: Manifest,
    files: Sequence[DataFile],
    shard_size: int,
    limit: int | None = None,
    rows_digest: Callable[[str, int], str] = lambda *_: "",
) -> Manifest:
    """Return `before` with further shards of what has come since; its own shards stay as they are.

    That is files, and rows at the end of a file whose earlier rows are unchanged by `rows_digest`, a source's. Raises
    `InputError` if a file has changed otherwise or is gone: what was analysed would not be what is there.
    """
    now = {file.path: file for file in files}
    kept: list[DataFile] = []
    start: dict[str, int] = {}
    for file in before.files:
        found = now.pop(file.path, None)
        if found is not None and (found.rows, found.digest) != (file.rows, file.digest):
            start[file.path] = file.rows
            may_have_grown = bool(file.rows_digest) and found.rows >= file.rows
            if not may_have_grown or rows_digest(file.path, file.rows) != file.rows_digest:
                found = None
        if found is None:
            state = "has changed" if file.path in start else "is gone"
            raise InputError(
                f"{file.path} {state} since it was analysed; a refresh takes in new files, and rows added at the end "
                "of metadata.jsonl, metadata.csv or COCO captions; begin another run in another OUT"
            )
        kept.append(found)
    fresh = [replace(file, rows=file.rows - start[file.path]) for file in kept if file.path in start]
    fresh += now.values()
    added = cut(fresh, shard_size, None if limit is None else max(0, limit - before.samples))
    if not added.shards:
        return before
    shards = (
        Shard(len(before.shards) + shard.shard_id, tuple(_moved(piece, start) for piece in shard.pieces))
        for shard in added.shards
    )
    return Manifest((*kept, *now.values()), (*before.shards, *shards))


def _moved(piece: Piece, start: Mapping[str, int]) -> Piece:
    """Return a piece of a file's new rows as one of the whole file's."""
    first = start.get(piece.path, 0)
    return Piece(piece.path, first + piece.start, first + piece.stop)


def read_shard(source: Source, shard: Shard) -> Iterator[Sample | Failure]:
    """Yield the shard's samples and failures, as many as it has samples; no two have the same given id.

    Of rows with the same id the first that can be read is the sample, and the others are failures: whoever looks an id
    up must not get the image of one row and the caption of another. Ids that are digests are equal where image and
    caption are. Raises `ShardError` if a file now has fewer rows than when the data was cut.
    """
    given, first = source.columns.sample_id is not None, dict[str, str]()
    for piece in shard.pieces:
        rows = 0
        for row in timed("read", source.read(piece.path, piece.start, piece.stop)):
            rows += 1
            if given and isinstance(row, Sample) and first.setdefault(row.sample_id, row.source) != row.source:
                message = f"sample id {row.sample_id!r} occurs twice; the first is used, at {first[row.sample_id]}"
                row = Failure(row.sample_id, row.source, DUPLICATE, message)
            yield row
        if rows != piece.stop - piece.start:
            raise ShardError(
                f"{source.data}: {piece.path} gave {rows} of the rows {piece.start} to {piece.stop}; "
                "it has changed since the run began"
            )
