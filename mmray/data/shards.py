"""Cut data once into numbered shards: a pure function of its files, with every sample in exactly one shard."""

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
"""Stage of a failure whose id an earlier row has."""

ImageEnd = Callable[[str, int], int]
"""A file and a sample of it → the first from there on that begins an image; see `Source.image_end`."""


@dataclass(frozen=True)
class Piece:
    """Samples `start` to `stop` (exclusive) of one file."""

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
        """Number of samples, including those that can't be read."""
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Manifest:
    """The data's files as they were when it was cut, and the shards."""

    files: tuple[DataFile, ...]
    shards: tuple[Shard, ...]

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the files' paths, rows and content digests, whatever the shard size."""
        files = json.dumps([[file.path, file.rows, file.digest] for file in self.files])
        return hashlib.sha256(files.encode()).hexdigest()

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> bytes:
        """Return the manifest as compact JSON, about 30 bytes per shard; equal manifests give equal bytes."""
        # Pieces refer to files by number: paths would make up most of the manifest.
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


def cut(
    files: Sequence[DataFile],
    shard_size: int,
    limit: int | None = None,
    image_end: ImageEnd = lambda _, sample: sample,
) -> Manifest:
    """Cut the first `limit` samples of `files` (None: all) into shards of `shard_size`; the last may be smaller.

    With the source's `image_end` a shard grows to hold all samples of its last image. Shards are contiguous and may
    span files, so shard n depends only on the sequence of samples. Raises `InputError` unless `shard_size` is at least
    1 and `limit` at least 0.
    """
    if shard_size < 1 or (limit is not None and limit < 0):
        raise InputError(
            f"shard size {shard_size}, limit {limit}: a shard holds at least 1 sample, a limit is at least 0"
        )
    # One pass over the files, filling one shard after another.
    left = sum(file.rows for file in files)
    left = left if limit is None else min(left, limit)
    shards: list[Shard] = []
    pieces: list[Piece] = []
    room = shard_size
    for file in files:
        start = 0
        while start < file.rows and left:
            stop = min(file.rows, start + left, image_end(file.path, start + room))
            pieces.append(Piece(file.path, start, stop))
            room, left, start = room - (stop - start), left - (stop - start), stop
            # Below 0 where the shard has grown to the end of its last image.
            if room <= 0 or not left:
                shards.append(Shard(len(shards), tuple(pieces)))
                pieces, room = [], shard_size
    return Manifest(tuple(files), tuple(shards))


def extend(
    before: Manifest,
    files: Sequence[DataFile],
    shard_size: int,
    limit: int | None = None,
    rows_digest: Callable[[str, int], str] = lambda *_: "",
    image_end: ImageEnd = lambda _, sample: sample,
) -> Manifest:
    """Return `before` with shards added for new files and appended rows; its own shards stay as they are.

    `rows_digest` and `image_end` are the source's; the first shows that a grown file's earlier rows are unchanged.
    Raises `InputError` if a file is gone, or has changed in another way: the results so far would be of data that no
    longer exists.
    """
    now = {file.path: file for file in files}
    kept: list[DataFile] = []
    start: dict[str, int] = {}
    for file in before.files:
        current = now.pop(file.path, None)
        if current is not None and (current.rows, current.digest) != (file.rows, file.digest):
            start[file.path] = file.rows
            may_have_grown = bool(file.rows_digest) and current.rows >= file.rows
            if not may_have_grown or rows_digest(file.path, file.rows) != file.rows_digest:
                current = None
        if current is None:
            state = "has changed" if file.path in start else "is gone"
            raise InputError(
                f"{file.path} {state} since it was analysed; a refresh takes in new files, and rows added at the end "
                "of metadata.jsonl, metadata.csv or COCO captions; begin another run in another OUT"
            )
        kept.append(current)
    # Appended rows are cut as if they were files of their own, and then shifted by the earlier rows.
    added = [replace(file, rows=file.rows - start[file.path]) for file in kept if file.path in start]
    added += now.values()

    def later_end(path: str, sample: int) -> int:
        return image_end(path, sample + start.get(path, 0)) - start.get(path, 0)

    new = cut(added, shard_size, None if limit is None else max(0, limit - before.samples), later_end)
    if not new.shards:
        return before
    shards = (
        Shard(len(before.shards) + shard.shard_id, tuple(_shifted(piece, start) for piece in shard.pieces))
        for shard in new.shards
    )
    return Manifest((*kept, *now.values()), (*before.shards, *shards))


def _shifted(piece: Piece, start: Mapping[str, int]) -> Piece:
    first = start.get(piece.path, 0)
    return Piece(piece.path, first + piece.start, first + piece.stop)


def read_shard(source: Source, shard: Shard) -> Iterator[Sample | Failure]:
    """Yield the shard's samples and failures, exactly `shard.samples` of them.

    Of rows with the same given id, the first readable one is the sample and the others are failures. Ids that are
    digests may repeat: image and caption are then equal too. Raises `ShardError` if a file now has fewer rows than
    when the data was cut.
    """
    # Otherwise a lookup by id could join the image of one row with the caption of another.
    given, first = source.columns.sample_id is not None, dict[str, str]()
    for piece in shard.pieces:
        rows = 0
        for row in timed("read", source.read(piece.path, piece.start, piece.stop)):
            rows += 1
            # Digests as ids need no check: equal ones are equal samples.
            if given and isinstance(row, Sample) and first.setdefault(row.sample_id, row.source) != row.source:
                message = f"sample id {row.sample_id!r} occurs twice; the first is used, at {first[row.sample_id]}"
                row = Failure(row.sample_id, row.source, DUPLICATE, message)
            yield row
        if rows != piece.stop - piece.start:
            raise ShardError(
                f"{source.data}: {piece.path} gave {rows} of the rows {piece.start} to {piece.stop}; "
                "it has changed since the run began"
            )
