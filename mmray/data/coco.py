"""COCO captions: an annotations JSON and its images. The `instances` file next to it gives objects and boxes."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar

from mmray.data import locations
from mmray.data.columns import OFF, Columns, detect, kinds_of_records
from mmray.data.folder import image_sizes, images_digest, records_digest
from mmray.data.locations import DataLocation
from mmray.data.rows import Record
from mmray.data.samples import Failure, Sample
from mmray.data.source import DataFile, Source
from mmray.errors import InputError
from mmray.storage import open_store

PEEKED = 16
"""Rows whose values tell what the columns hold."""
TRIED = 4
"""Images looked up in each candidate folder."""
CACHED_FILES = 4
IMAGE_FOLDERS = ("{split}", "../{split}", "images/{split}", "../images/{split}", "images", "../images", ".", "..")
"""Where the images of `captions_SPLIT.json` may be, relative to its folder, most common first."""

REFERENCES = "references"
"""Key added to an image: all its captions."""

Row = tuple[dict[str, Any], dict[str, Any]] | str
"""An image and its annotation (empty if none), or why there is no row.

Merged only when read: the captions of an image share its dict, which saves memory.
"""


@dataclass(frozen=True)
class CocoSource(Source):
    """Captions files: one row per caption, those of an image adjacent; without captions one row per image.

    Columns are the keys of annotation and image, and `sample_id` (image and annotation id), `objects`, `boxes`.
    """

    kind: ClassVar[str] = "coco"

    image_folders: tuple[str, ...]
    """One per captions file."""

    def files(self) -> list[DataFile]:
        """Return the captions files; sizes and digests include the instances file and the images."""
        files = []
        for entry, folder in zip(self.location.entries, self.image_folders, strict=True):
            images, size = images_digest(image_sizes(folder))
            # Objects and images count too: either can change while the captions stay.
            digest = hashlib.sha256(images.encode())
            for part in (entry, open_store(self.location.folder).entry(instances_key(entry.key))):
                if part is not None:
                    digest.update(locations.identity(self.location.folder, part, whole=True).encode())
                    size += part.size
            rows = len(self._rows(entry.key))
            files.append(DataFile(entry.key, rows, size, digest.hexdigest(), self.rows_digest(entry.key, rows)))
        return files

    def rows_digest(self, path: str, rows: int) -> str:
        """Return a digest of a captions file's first rows, with objects and boxes, and of their images' sizes."""
        records = (record for _, record in self.records(path, 0, rows))
        return records_digest(records, str(self.columns.image), image_sizes(self._image_folder(path)))

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of one captions file."""
        rows = enumerate(self._rows(path)[start:stop], start)
        yield from ((f"{path}#{number}", _record(row)) for number, row in rows)

    def fetch(self, path: str, names: list[str]) -> list[bytes | str]:
        """Return the images that rows of a captions file name, as bytes or the reason why not."""
        return locations.fetch(self._image_folder(path), names)

    def annotations(self) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield the object names of each row (None without any) and all captions of its image."""
        for entry in self.location.entries:
            for row in self._rows(entry.key):
                if not isinstance(row, str):
                    yield (row[0] | row[1]).get(str(self.columns.objects)), _references(row)

    def read(self, path: str, start: int, stop: int) -> Iterator[Sample | Failure]:
        """Yield rows `start` to `stop` (exclusive) of one file, each with all captions of its image."""
        for row, sample in zip(self._rows(path)[start:stop], super().read(path, start, stop), strict=True):
            yield replace(sample, references=_references(row)) if isinstance(sample, Sample) else sample

    def image_end(self, path: str, sample: int) -> int:
        """Return the first row of a file, from this one on, that is not of the same image as the one before it."""
        rows = self._rows(path)
        # Captions of an image share its dict.
        while 0 < sample < len(rows) and not isinstance(rows[sample], str) and rows[sample][0] is rows[sample - 1][0]:
            sample += 1
        return sample

    def _image_folder(self, path: str) -> str:
        return self.image_folders[[entry.key for entry in self.location.entries].index(path)]

    def _rows(self, path: str) -> tuple[Row, ...]:
        return rows(self.location.folder, path, self.entry(path).version, self.captions)


def open_coco(
    data: str, location: DataLocation, requested: Columns, captions: bool, image_folder: str | None = None
) -> CocoSource:
    """Open captions files, with their images in `image_folder` or one of `IMAGE_FOLDERS`.

    Raises `InputError` if a file is not COCO, no image is found, or a column is missing.
    """
    if not captions:
        requested = requested.model_copy(update={"caption": OFF})  # it is in the annotations, which are not read
    by_file = [rows(location.folder, entry.key, entry.version, captions) for entry in location.entries]
    pairs = [row for file in by_file for row in file if not isinstance(row, str)]
    # An image without captions has no caption column: judge by images that have captions, if there are any.
    annotated = [row for row in pairs if row[1]] or pairs
    records = [record for row in annotated[:PEEKED] if not isinstance(record := _record(row), str)]
    where = locations.join(location.folder, location.entries[0].key)
    if captions:
        _check_captions(where, [note for _, note in annotated if note], sum(map(len, by_file)) - len(pairs))
    columns = detect(kinds_of_records(records), requested, where, captions)
    folders = []
    for entry, file in zip(location.entries, by_file, strict=True):
        first = islice((row[0] for row in file if not isinstance(row, str)), TRIED)
        names = [str(image.get(str(columns.image))) for image in first]
        folders.append(image_folder or _find_images(location.folder, entry.key, names))
    return CocoSource(data, location, columns, captions, tuple(folders))


def _check_captions(where: str, annotations: Sequence[dict[str, Any]], strays: int) -> None:
    """Raise `InputError` unless some annotation may hold a caption; `strays` have an unknown image."""
    if any("category_id" not in note or "caption" in note for note in annotations):
        return
    if annotations:
        raise InputError(f"{where}: annotations of objects, without captions; name the captions file")
    if strays:
        raise InputError(
            f"{where}: none of its annotations is of one of its images; take captions and images of one split"
        )
    raise InputError(f"{where}: no annotations; name the captions file")


def instances_key(captions_key: str) -> str:
    """Return the key of the instances file of the same split."""
    folder, slash, name = captions_key.rpartition("/")
    return folder + slash + name.replace("captions", "instances", 1)


@lru_cache(maxsize=CACHED_FILES)
def rows(folder: str, key: str, version: str, captions: bool) -> tuple[Row, ...]:
    """Return the rows of a captions file in the order of its images; raises `InputError` if it isn't COCO.

    `version` is part of the cache's key, so that a changed file is read again.
    """
    content = _load(folder, key)
    images: dict[Any, dict[str, Any]] = {}
    strays: list[Row] = []
    for image in content["images"]:
        identifier = _identifier(image, "id")
        if identifier is None:
            strays.append("image without an id")
        else:
            images[identifier] = dict(image)
    by_image: dict[Any, list[Any]] = {identifier: [] for identifier in images}
    for annotation in content.get("annotations", []):
        identifier = _identifier(annotation, "image_id")
        if identifier in by_image:
            by_image[identifier].append(annotation)
        elif captions:
            strays.append(f"annotation of image {identifier!r}, which is not among the images")
    # A name without "captions" has no instances file: its key would be the file's own.
    if instances_key(key) != key and open_store(folder).entry(instances_key(key)) is not None:
        _add_objects(images, _load(folder, instances_key(key)))
    pairs: list[Row] = []
    for identifier, image in images.items():
        image[REFERENCES] = [annotation.get("caption") for annotation in by_image[identifier]]
        own = by_image[identifier] if captions else []
        pairs += [(image, annotation) for annotation in own] or [(image, {})]
    # Strays come last, so that they don't shift the rows that are read.
    return (*pairs, *strays)


def _references(row: Row) -> tuple[str, ...]:
    captions = () if isinstance(row, str) else row[0][REFERENCES]
    return tuple(caption for caption in captions if isinstance(caption, str) and caption.strip())


def _record(row: Row) -> Record:
    if isinstance(row, str):
        return row
    image, annotation = row
    identifier = f"{image['id']}-{annotation.get('id')}" if annotation else str(image["id"])
    return image | annotation | {"sample_id": identifier}


def _load(folder: str, key: str) -> dict[str, Any]:
    def without_outline(item: dict[str, Any]) -> dict[str, Any]:
        # Segmentation outlines are most of an instances file, and take ten times their size in memory.
        item.pop("segmentation", None)
        return item

    where = locations.join(folder, key)
    try:
        content = json.loads(locations.read(folder, key) or b"", object_hook=without_outline)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); copy it again") from error
    lists = (
        [content.get(name, []) for name in ("images", "annotations", "categories")] if isinstance(content, dict) else []
    )
    if not lists or not lists[0] or not all(isinstance(part, list) for part in lists):
        raise InputError(f"{where}: not COCO JSON: it needs a list of images and a list of annotations")
    return dict(content)


def _add_objects(images: Mapping[Any, dict[str, Any]], instances: Mapping[str, Any]) -> None:
    """Add `objects` and `boxes`, in 0..1, to each image. Malformed values are kept: reading the row reports them."""
    names = {_identifier(category, "id"): category.get("name") for category in instances.get("categories", [])}
    objects: dict[Any, list[Any]] = defaultdict(list)
    boxes: dict[Any, list[Any]] = defaultdict(list)
    for annotation in instances.get("annotations", []):
        identifier = _identifier(annotation, "image_id")
        if identifier in images:
            objects[identifier].append(names.get(_identifier(annotation, "category_id")))
            boxes[identifier].append(_scaled(annotation.get("bbox"), images[identifier]))
    for identifier, image in images.items():
        image |= {"objects": objects[identifier], "boxes": boxes[identifier]}


def _scaled(box: Any, image: Mapping[str, Any]) -> Any:
    try:
        x, y, width, height = box
        across, down = image["width"], image["height"]
        scaled = [x / across, y / down, width / across, height / down]
    except (TypeError, ValueError, KeyError, ZeroDivisionError):
        return box
    # COCO's boxes exceed the image by rounding.
    return [min(max(number, 0.0), 1.0) for number in scaled]


def _identifier(item: Any, field: str) -> Any:
    value = item.get(field) if isinstance(item, dict) else None
    return value if isinstance(value, int | str) else None


def _find_images(folder: str, key: str, names: list[str]) -> str:
    parent = locations.join(folder, key.rpartition("/")[0])
    # captions_val2017.json is of the split val2017.
    split = key.rpartition("/")[2].rpartition(".")[0].rpartition("_")[2]
    for pattern in IMAGE_FOLDERS:
        candidate = locations.resolve(parent, pattern.format(split=split))
        if any(isinstance(content, bytes) for content in locations.fetch(candidate, names)):
            return candidate
    raise InputError(f"{locations.join(folder, key)}: its images are not next to it; write {key}:IMAGES_FOLDER")
