"""DATA as users name it → the source that reads it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatch

from mmray.data.coco import open_coco
from mmray.data.columns import IMAGE_SUFFIXES, Columns
from mmray.data.folder import open_folder
from mmray.data.hub import open_hub
from mmray.data.parquet import open_parquet
from mmray.data.places import DataLocation, find, store_errors
from mmray.data.source import DataFile, Source
from mmray.data.webdataset import open_webdataset
from mmray.errors import InputError
from mmray.runs.home import COCO_WITH_IMAGES
from mmray.storage import open_store

__all__ = ["DataFile", "Source", "open_source"]

FORMS = "Parquet files, WebDataset tars, an image folder with metadata.jsonl or metadata.csv, or COCO captions_*.json"

NAMES_IN_FOLDERS = {
    "metadata.jsonl": "folder",
    "metadata.csv": "folder",
    "captions*.json": "coco",
    "*.parquet": "parquet",
    "*.tar": "webdataset",
}
"""Pattern of a file's name → the kind of data it makes of its folder."""

NAMES_ALONE = {"*.parquet": "parquet", "*.tar": "webdataset", "*.jsonl": "folder", "*.csv": "folder", "*.json": "coco"}
"""Pattern of a file's name → its kind, for files that the user named."""

OPENERS: dict[str, Callable[[str, DataLocation, Columns, bool], Source]] = {
    "folder": open_folder,
    "coco": open_coco,
    "parquet": open_parquet,
    "webdataset": open_webdataset,
}


def open_source(data: str, columns: Columns | None = None, captions: bool = True) -> Source:
    """Return the source of `data`, its columns found, nothing but what they need read.

    `captions` false accepts data and rows without captions, for when the model is to write them.
    Raises `InputError` in one line: a missing path, an empty folder, nothing or more than one kind recognised, a
    missing column, damaged files.
    """
    asked = columns or Columns()
    if data.startswith("hf:"):
        return open_hub(data, asked, captions)
    path, image_folder = data, None
    if data == "demo":
        from mmray.demo import DATA

        path = str(DATA)
    elif match := COCO_WITH_IMAGES.fullmatch(data):
        path, image_folder = match.groups()
    with store_errors(data):
        place = find(path)
        kind, place = _recognise(data, place)
        if image_folder is not None:
            return open_coco(data, place, asked, captions, open_store(image_folder).uri)
        return OPENERS[kind](data, place, asked, captions)


def _recognise(data: str, place: DataLocation) -> tuple[str, DataLocation]:
    """Return the kind of data, and the place with that kind's files alone; raises `InputError` unless there is one."""
    names = NAMES_IN_FOLDERS if place.whole else NAMES_ALONE
    by_kind = defaultdict(list)
    for entry in place.entries:
        name = entry.key.rpartition("/")[2]
        kind = next((kind for pattern, kind in names.items() if fnmatch(name.lower(), pattern)), None)
        if kind is not None:
            by_kind[kind].append(entry)
    if len(by_kind) > 1:
        raise InputError(f"{data}: holds {' and '.join(sorted(by_kind))} data; name one, such as '{data}/*.parquet'")
    for kind, entries in by_kind.items():
        return kind, DataLocation(place.folder, tuple(entries), place.whole)
    suffixes = {entry.key.lower().partition(".")[2] for entry in place.entries}
    if suffixes & set(IMAGE_SUFFIXES):
        raise InputError(f"{data}: images without captions; add a metadata.jsonl of file_name and caption")
    if suffixes & {"tar.gz", "tgz"}:
        raise InputError(f"{data}: compressed tars can't be read in parts; decompress them (gunzip)")
    raise InputError(f"{data}: nothing recognised here; data is {FORMS}")
