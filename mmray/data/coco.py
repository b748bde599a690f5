"""COCO captions: annotations JSON and its images; the `instances` file in the same folder gives objects and boxes."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar

from mmray.data import places
from mmray.data.columns import OFF, Columns, detect, kinds_of_records
from mmray.data.folder import image_sizes, images_digest, records_digest
from mmray.data.places import DataLocation
from mmray.data.rows import Record
from mmray.data.samples import Failure, Sample
from mmray.data.source import DataFile, FileSource
from mmray.errors import InputError
from mmray.storage import open_store

PEEKED = 16
TRIED = 4
CACHED_FILES = 4
IMAGE_FOLDERS = ("{split}", "../{split}", "images/{split}", "../images/{split}", "images", "../images", ".", "..")
"""Where the images of `captions_SPLIT.json` may lie, seen from its folder, the usual place first."""

REFERENCES = "references"
"""Key of an image: all its captions."""

Row = tuple[dict[str, Any], dict[str, Any]] | str
"""An image and its annotation, empty if it has none; kept apart until read, to be small. Or why there is none."""


@dataclass(frozen=True)
class CocoSource(FileSource):
    """Captions files, a row a caption, the captions of an image adjacent; without captions a row is an image.

    Columns are the keys of annotation and image, and `sample_id` (image and annotation id), `objects`, `boxes`.
    `image_folders` gives each captions file's.
    """

    kind: ClassVar[str] = "coco"

    image_folders: tuple[str, ...]

    def files(self) -> list[DataFile]:
        """Return the captions files; their sizes and digests take in the instances file and the images."""
        described = []
        for entry, folder in zip(self.place.entries, self.image_folders, strict=True):
            images, size = images_digest(image_sizes(folder))
            digest = hashlib.sha256(images.encode())
            for part in (entry, open_store(self.place.folder).entry(instances_key(entry.key))):
                if part is not None:
                    digest.update(places.identity(self.place.folder, part, whole=True).encode())
                    size += part.size
            rows = len(self._rows(entry.key))
            described.append(DataFile(entry.key, rows, size, digest.hexdigest(), self.rows_digest(entry.key, rows)))
        return described

    def rows_digest(self, path: str, rows: int) -> str:
        """Return a digest of a captions file's first rows, objects and boxes included, and of their images' sizes."""
        found = (record for _, record in self.records(path, 0, rows))
        return records_digest(found, str(self.columns.image), image_sizes(self._images(path)))

    def records(self, path: str, start: int, stop: int) -> Iterator[tuple[str, Record]]:
        """Yield rows of one captions file."""
        yield from ((f"{path}#{row}", _record(found)) for row, found in enumerate(self._rows(path)[start:stop], start))

    def fetch(self, path: str, names: list[str]) -> list[bytes | str]:
        """Return the images that rows of a captions file name, as bytes or why not."""
        return places.fetch(self._images(path), names)

    def object_cells(self) -> Iterable[Any]:
        """Yield the object names of each row."""
        for entry in self.place.entries:
            records = (_record(row) for row in self._rows(entry.key))
            yield from (record.get(str(self.columns.objects)) for record in records if not isinstance(record, str))

    def annotations(self) -> Iterator[tuple[Any, tuple[str, ...]]]:
        """Yield the object names of each row, None without any, and all captions of its image."""
        for entry in self.place.entries:
            for row in self._rows(entry.key):
                if not isinstance(row, str):
                    yield (row[0] | row[1]).get(str(self.columns.objects)), _references(row)

    def read(self, path: str, start: int, stop: int) -> Iterator[Sample | Failure]:
        """Yield rows `start` to `stop` (left out) of one file, with all captions of the image that each is of."""
        found = zip(self._rows(path)[start:stop], super().read(path, start, stop), strict=True)
        yield from (
            replace(sample, references=_references(row)) if isinstance(sample, Sample) else sample
            for row, sample in found
        )

    def _images(self, path: str) -> str:
        numbers = {entry.key: number for number, entry in enumerate(self.place.entries)}
        return self.image_folders[numbers[path]]

    def _rows(self, path: str) -> tuple[Row, ...]:
        return rows(self.place.folder, path, self.entry(path).version, self.captions)


def open_coco(
    data: str, place: DataLocation, asked: Columns, captions: bool, image_folder: str | None = None
) -> CocoSource:
    """Return the source of captions files, their images in `image_folder` or in one of the usual places.

    Raises `InputError` if a file is not COCO, no image is found, or a column is missing.
    """
    if not captions:
        asked = asked.model_copy(update={"caption": OFF})  # annotations, which hold it, are left out
    listed = [rows(place.folder, entry.key, entry.version, captions) for entry in place.entries]
    pairs = [row for found in listed for row in found if not isinstance(row, str)]
    # An image without captions has no caption column: look at those with, if there are any.
    telling = [row for row in pairs if row[1]] or pairs
    records = [record for row in telling[:PEEKED] if not isinstance(record := _record(row), str)]
    where = places.join(place.folder, place.entries[0].key)
    if captions and not _has_captions(telling):
        raise InputError(_without_captions(where, telling, sum(map(len, listed)) - len(pairs)))
    columns = detect(kinds_of_records(records), asked, where, captions)
    folders = []
    for entry, found in zip(place.entries, listed, strict=True):
        first = islice((row[0] for row in found if not isinstance(row, str)), TRIED)
        names = [str(image.get(str(columns.image))) for image in first]
        folders.append(image_folder or _find_images(place.folder, entry.key, names))
    return CocoSource(data, place, columns, captions, tuple(folders))


def _has_captions(telling: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Return whether there is an annotation, and it may be of a caption: not of an object."""
    return any(note and not ("category_id" in note and "caption" not in note) for _, note in telling)


def _without_captions(where: str, telling: Sequence[tuple[dict[str, Any], dict[str, Any]]], strays: int) -> str:
    """Return why a file has no captions for its images."""
    if any(note for _, note in telling):
        return f"{where}: annotations of objects, without captions; name the captions file"
    if strays:
        return f"{where}: none of its annotations is of one of its images; take captions and images of one split"
    return f"{where}: no annotations; name the captions file"


def instances_key(captions_key: str) -> str:
    """Return the key of the instances file of the same split."""
    folder, slash, name = captions_key.rpartition("/")
    return folder + slash + name.replace("captions", "instances", 1)


@lru_cache(maxsize=CACHED_FILES)
def rows(folder: str, key: str, version: str, captions: bool) -> tuple[Row, ...]:
    """Return the rows of a captions file in the order of its images; raises `InputError` if it isn't COCO."""
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
    if instances_key(key) != key and open_store(folder).entry(instances_key(key)) is not None:
        _add_objects(images, _load(folder, instances_key(key)))
    found: list[Row] = []
    for identifier, image in images.items():
        image[REFERENCES] = [annotation.get("caption") for annotation in by_image[identifier]]
        own = by_image[identifier] if captions else []
        found += [(image, annotation) for annotation in own] or [(image, {})]
    return (*found, *strays)


def _references(row: Row) -> tuple[str, ...]:
    found = () if isinstance(row, str) else row[0][REFERENCES]
    return tuple(caption for caption in found if isinstance(caption, str) and caption.strip())


def _record(row: Row) -> Record:
    if isinstance(row, str):
        return row
    image, annotation = row
    identifier = f"{image['id']}-{annotation.get('id')}" if annotation else str(image["id"])
    return image | annotation | {"sample_id": identifier}


def _load(folder: str, key: str) -> dict[str, Any]:
    def without_outline(item: dict[str, Any]) -> dict[str, Any]:
        # Outlines are most of an instances file, and take ten times their size in memory.
        item.pop("segmentation", None)
        return item

    where = places.join(folder, key)
    try:
        content = json.loads(places.read(folder, key) or b"", object_hook=without_outline)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); copy it again") from error
    lists = (
        [content.get(name, []) for name in ("images", "annotations", "categories")] if isinstance(content, dict) else []
    )
    if not lists or not lists[0] or not all(isinstance(part, list) for part in lists):
        raise InputError(f"{where}: not COCO JSON: it needs a list of images and a list of annotations")
    return dict(content)


def _add_objects(images: Mapping[Any, dict[str, Any]], instances: Mapping[str, Any]) -> None:
    """Give each image `objects` and `boxes`, in 0..1; what is malformed is handed on, to be refused with its row."""
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
    return [min(max(number, 0.0), 1.0) for number in scaled]


def _identifier(item: Any, field: str) -> Any:
    value = item.get(field) if isinstance(item, dict) else None
    return value if isinstance(value, int | str) else None


def _find_images(folder: str, key: str, names: list[str]) -> str:
    home = places.join(folder, key.rpartition("/")[0])
    split = key.rpartition("/")[2].rpartition(".")[0].rpartition("_")[2]
    for pattern in IMAGE_FOLDERS:
        candidate = places.beside(home, pattern.format(split=split))
        if any(isinstance(content, bytes) for content in places.fetch(candidate, names)):
            return candidate
    raise InputError(f"{places.join(folder, key)}: its images are not next to it; write {key}:IMAGES_FOLDER")
