"""Write a run's report, with pictures that are read from the data. Needs neither a GPU nor torch."""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmray.data.columns import Columns
from mmray.data.images import decode_image
from mmray.data.samples import BACKGROUND, Failure, Sample
from mmray.data.shards import Manifest, Shard, cut, read_shard
from mmray.data.sources import Source, open_source
from mmray.errors import InputError, ShardError
from mmray.report.content import WHOLE, gather
from mmray.report.pages import write_pages, write_whole
from mmray.runs.home import resolve_data
from mmray.runs.run import Run
from mmray.storage import open_object, open_store

SIDE = 224
"""Maximum pixels of a picture's longer side."""
QUALITY = 72

logger = logging.getLogger(__name__)


def write_report(
    run: Run, out: str | Path | None = None, edits: Sequence[str] = (), pages: str | Path | None = None
) -> str:
    """Write the report of a run, and return where it is.

    `out` is a file (default: RUN/report.html). With `pages` it is a folder of many small files instead, for runs with
    thousands of concepts. Both may be s3://. `edits` are folders of edits to show, in addition to those in RUN/edits.
    Where the data can no longer be read, the report has no pictures. Raises InputError for a run without tables.
    """
    content = gather(run, edits, None if pages else WHOLE)
    pictures = run_pictures(run, content.samples())
    for data, names in content.elsewhere().items():
        pictures |= data_pictures(run, data, names - set(pictures))
    if pages:
        write_pages(content, pictures, open_store(pages))
        return f"{str(pages).rstrip('/')}/index.html"
    target = str(out or f"{run.uri}/report.html")
    store, key = open_object(target)
    store.put(key, write_whole(content, pictures))
    return target


def run_pictures(run: Run, wanted: Collection[str]) -> dict[str, bytes]:
    """Return thumbnails of samples of the run's data, reading only the shards that hold them."""
    by_shard: dict[int, set[str]] = defaultdict(set)
    names = set(wanted)
    for row in run.table("captions").select(["sample_id", "shard_id"]).to_pylist():
        if row["sample_id"] in names:
            by_shard[row["shard_id"]].add(row["sample_id"])
    shards = {shard.shard_id: shard for shard in Manifest.from_json(run.folder.manifest()).shards}
    return _pictures(run, run.info["settings"]["data"], [shards[number] for number in sorted(by_shard)], names)


def data_pictures(run: Run, data: str, wanted: Collection[str]) -> dict[str, bytes]:
    """Return thumbnails of samples of other data, with the run's columns, reading all of it until they are found."""
    if not wanted:
        return {}
    return _pictures(run, data, None, set(wanted))


def _pictures(run: Run, data: str, shards: Sequence[Shard] | None, wanted: set[str]) -> dict[str, bytes]:
    columns = Columns(**run.info["data"]["columns"])
    found: dict[str, bytes] = {}
    try:
        # Rows are numbered as the census read them: with `captions`, rows without a caption are not samples.
        captions = shards is not None and run.info["settings"]["captions"] == "dataset"
        for row in _rows(open_source(resolve_data(data, run.info["home"]), columns, captions), shards):
            if isinstance(row, Sample) and row.sample_id in wanted and row.sample_id not in found:
                found |= _picture_of(row)
                if len(found) == len(wanted):
                    break  # data may be much larger than what the report shows
    except (InputError, ShardError) as error:
        logger.warning("no pictures of %s: %s", data, error)
    return found


def _picture_of(sample: Sample) -> dict[str, bytes]:
    try:
        return {sample.sample_id: picture(sample.image, sample.background)} if sample.image else {}
    except ValueError:
        return {}  # the census lists it in its table of errors


def _rows(source: Source, shards: Sequence[Shard] | None) -> Iterator[Sample | Failure]:
    if shards is None:
        # One shard, because other data has no manifest to say where its samples are.
        files = source.files()
        shards = cut(files, max(1, sum(file.rows for file in files))).shards
    for shard in shards:
        yield from read_shard(source, shard)


def picture(encoded: bytes, background: str = BACKGROUND) -> bytes:
    """Return a thumbnail of an image as WebP. Raises ValueError where it can't be decoded."""
    image: Any = decode_image(encoded, background)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
