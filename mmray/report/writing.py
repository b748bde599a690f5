"""Write a run's report, with pictures that are read from the data. Needs neither a GPU nor torch."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from mmray.data.columns import Columns
from mmray.data.images import decode_image
from mmray.data.samples import BACKGROUND, Failure, Sample
from mmray.data.shards import Manifest, Shard, cut, read_shard
from mmray.data.sources import Source, open_source
from mmray.errors import InputError, ShardError
from mmray.report.concepts import among
from mmray.report.content import WHOLE, Content, gather
from mmray.report.fitting import concepts_that_fit, pictures_that_fit, pictures_wanted
from mmray.report.pages import write_pages, write_whole
from mmray.runs.card import public_name
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

    `out` is a file (default: RUN/report.html) of at most 15 MB: it has the most frequent concepts and the pictures that
    fit. With `pages` it is a folder of many small files instead, with all of them. Both may be s3://. `edits` are
    folders of edits to show, in addition to those in RUN/edits. Where the data can no longer be read, the report has no
    pictures. Raises InputError for a run without tables.
    """
    if pages:
        content = gather(run, edits)
        write_pages(content, _all_pictures(run, content, content.samples()), open_store(pages))
        return f"{str(pages).rstrip('/')}/index.html"
    target = str(out or f"{run.uri}/report.html")
    store, key = open_object(target)
    store.put(key, write_whole(*_fitted(run, edits)))
    return target


def shareable_report(run: Run) -> bytes:
    """Return the report of a run and of the edits in it as one HTML file that names no path of this machine."""
    content, pictures = _fitted(run)
    failures = content.index["failures"]
    # Their sources and messages name files.
    rows = [row | {"source": None, "message": None} for row in failures["rows"]]
    index = _without_folders(content.index | {"failures": failures | {"rows": rows}})
    return write_whole(replace(content, index=index), pictures)


def _without_folders(value: Any) -> Any:
    """Return JSON with the last component in place of every absolute path, and without the passwords of addresses."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(part) for part in value]
    if isinstance(value, str) and (PurePath(value).is_absolute() or "://" in value):
        return public_name(value)
    return value


def _fitted(run: Run, edits: Sequence[str] = ()) -> tuple[Content, dict[str, bytes]]:
    """Return what of a run fits into a report of one file, and its pictures."""
    content = gather(run, edits, WHOLE)
    if (fit := concepts_that_fit(content)) < len(content.concepts):
        content = gather(run, edits, fit)
    wanted = pictures_wanted(content)
    readable = _all_pictures(run, content, wanted)
    pictures = pictures_that_fit(content, readable)
    if len(pictures) < len(readable) or len(wanted) < len(content.samples()):
        content.index["some_pictures"] = True
    return content, pictures


def _all_pictures(run: Run, content: Content, samples: Collection[str]) -> dict[str, bytes]:
    """Return thumbnails of these samples of the run, and of all samples of other data that the pages show."""
    pictures = run_pictures(run, samples)
    for data, names in content.elsewhere().items():
        pictures |= data_pictures(run, data, names - set(pictures))
    return pictures


def run_pictures(run: Run, wanted: Collection[str]) -> dict[str, bytes]:
    """Return thumbnails of samples of the run's data, reading only the shards that hold them."""
    return _pictures(run_samples(run, wanted))


def run_samples(run: Run, wanted: Collection[str]) -> Iterator[Sample]:
    """Yield samples of the run's data, reading only the shards that hold them; none if it can't be read any more."""
    rows = run.rows("captions", among("sample_id", list(wanted)), ["shard_id"])
    shards = {shard.shard_id: shard for shard in Manifest.from_json(run.folder.manifest()).shards}
    found = [shards[number] for number in sorted(set(rows["shard_id"].to_pylist()))]
    yield from _samples(run, run.info["settings"]["data"], found, set(wanted))


def data_pictures(run: Run, data: str, wanted: Collection[str]) -> dict[str, bytes]:
    """Return thumbnails of samples of other data, with the run's columns, reading all of it until they are found."""
    if not wanted:
        return {}
    return _pictures(_samples(run, data, None, set(wanted)))


def _samples(run: Run, data: str, shards: Sequence[Shard] | None, wanted: set[str]) -> Iterator[Sample]:
    columns = Columns(**run.info["data"]["columns"])
    left = set(wanted)
    try:
        # Rows are numbered as the census read them: with `captions`, rows without a caption are not samples.
        captions = shards is not None and run.info["settings"]["captions"] == "dataset"
        for row in _rows(open_source(resolve_data(data, run.info["home"]), columns, captions), shards):
            if isinstance(row, Sample) and row.sample_id in left:
                left.remove(row.sample_id)
                yield row
            if not left:
                break  # data may be much larger than what the report shows
    except (InputError, ShardError) as error:
        logger.warning("no pictures of %s: %s", data, error)


def _pictures(samples: Iterable[Sample]) -> dict[str, bytes]:
    found = {}
    for sample in samples:
        # The census lists those that can't be decoded in its table of errors.
        with suppress(ValueError):
            if sample.image:
                found[sample.sample_id] = picture(sample.image, sample.background)
    return found


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
