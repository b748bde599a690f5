"""Open DATA as the user names it. FORMATS is the registry of input formats: to add one, add an entry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from mmray.data.coco import open_coco
from mmray.data.columns import IMAGE_SUFFIXES, Columns
from mmray.data.folder import open_folder
from mmray.data.hub import PREFIX, open_hub
from mmray.data.locations import DataLocation, find, store_errors
from mmray.data.parquet import open_parquet
from mmray.data.source import DataFile, Source
from mmray.data.webdataset import open_webdataset
from mmray.errors import InputError
from mmray.runs.home import COCO_WITH_IMAGES
from mmray.storage import open_store

__all__ = ["FORMATS", "DataFile", "Format", "Source", "open_source"]


@dataclass(frozen=True)
class Format:
    """One input format: what it is called in messages, which file names it recognises, and what opens it."""

    description: str
    named: tuple[str, ...]
    """Patterns of files that the user named, in lower case."""
    in_folder: tuple[str, ...]
    """Patterns of files that make a named folder this kind of data. Narrower: a folder may hold any other JSON."""
    open: Callable[[str, DataLocation, Columns, bool], Source]
    """Called with DATA, its files, the requested columns, and whether captions are needed."""


FORMATS: dict[str, Format] = {
    "parquet": Format("Parquet files", ("*.parquet",), ("*.parquet",), open_parquet),
    "webdataset": Format("WebDataset tars", ("*.tar",), ("*.tar",), open_webdataset),
    "folder": Format(
        "an image folder with metadata.jsonl or metadata.csv",
        ("*.jsonl", "*.csv"),
        ("metadata.jsonl", "metadata.csv"),
        open_folder,
    ),
    "coco": Format("COCO captions_*.json", ("*.json",), ("captions*.json",), open_coco),
    # Known by its prefix, and not by any file.
    "hub": Format(f"{PREFIX}NAME", (), (), open_hub),
}
"""By name, as run.json records it."""


def open_source(data: str, columns: Columns | None = None, captions: bool = True) -> Source:
    """Open `data` and find its columns; only what that needs is read.

    With `captions` false, data and rows without captions are accepted, because the model will write them.
    Raises `InputError` in one line: a missing path, an empty folder, no format or several recognised, a missing
    column, damaged files.
    """
    requested = columns or Columns()
    if data.startswith(PREFIX):
        return open_hub(data, DataLocation("", ()), requested, captions)
    path, image_folder = data, None
    if data == "demo":
        from mmray.demo import DATA

        path = str(DATA)
    elif match := COCO_WITH_IMAGES.fullmatch(data):
        path, image_folder = match.groups()
    with store_errors(data):
        name, location = _recognise(data, find(path))
        if image_folder is not None:
            return open_coco(data, location, requested, captions, open_store(image_folder).uri)
        return FORMATS[name].open(data, location, requested, captions)


def _recognise(data: str, location: DataLocation) -> tuple[str, DataLocation]:
    """Return the data's format, and the location with only that format's files.

    Raises `InputError` unless exactly one format is found.
    """
    found = defaultdict(list)
    for entry in location.entries:
        file = entry.key.rpartition("/")[2].lower()
        for name, form in FORMATS.items():
            if any(fnmatch(file, pattern) for pattern in (form.in_folder if location.whole else form.named)):
                found[name].append(entry)
                break
    if len(found) > 1:
        raise InputError(f"{data}: holds {' and '.join(sorted(found))} data; name one, such as '{data}/*.parquet'")
    for name, entries in found.items():
        return name, replace(location, entries=tuple(entries))
    # Nothing fits: say what the files probably are.
    suffixes = {entry.key.lower().partition(".")[2] for entry in location.entries}
    if suffixes & set(IMAGE_SUFFIXES):
        raise InputError(f"{data}: images without captions; add a metadata.jsonl of file_name and caption")
    if suffixes & {"tar.gz", "tgz"}:
        raise InputError(f"{data}: compressed tars can't be read in parts; decompress them (gunzip)")
    *first, last = (form.description for form in FORMATS.values() if form.named)
    raise InputError(f"{data}: nothing recognised here; data is {', '.join(first)}, or {last}")
