"""Which columns of the data hold the image, the caption and the rest: named by the user, or found by usual names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mmray.data.samples import BACKGROUND
from mmray.errors import InputError

Kind = Literal["text", "number", "bytes", "image", "texts", "boxes", "questions", "unknown", "other"]
"""What a column holds, as far as its type or first values tell; `unknown` (only nulls seen) fits everywhere."""

OFF = "none"
"""Given as a column's name: don't use such a column, even if there is one."""


class Columns(BaseModel):
    """Columns of the data by name, and how its images are read.

    A column left out is found by its usual names, and `none` turns it off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image: str | None = None
    """Column of the image: encoded bytes, a struct of bytes and path, or a path below the data's folder."""
    caption: str | None = None
    """Column of the caption; of a list of captions each is a sample of the image."""
    sample_id: str | None = None
    """Column of the sample's identifier; without one it is a digest of image and caption."""
    language: str | None = None
    """Column of the caption's language."""
    domain: str | None = None
    """Column of the image's domain."""
    objects: str | None = None
    """Column of the names of the objects in the image."""
    boxes: str | None = None
    """Column of the objects' boxes, each (x, y, width, height) in 0..1 of the image."""
    questions: str | None = None
    """Column of (question, answer) pairs."""
    caption_language: str | None = None
    """Not a column: the language of captions for which the column gives none."""
    labels: tuple[str, ...] = ()
    """Further columns whose values label a sample."""
    background: str = BACKGROUND
    """Colour behind transparent pixels."""

    def used(self) -> tuple[str, ...]:
        """Return the names of the columns to read, each once, in a fixed order."""
        named = [getattr(self, field) for field in USUAL_NAMES]
        return tuple(dict.fromkeys(name for name in [*named, *self.labels] if name is not None))


IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
TEXT_ONLY_NAMES = ("text", "sentence", "sentences", "txt")

USUAL_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": (
        "image",
        "img",
        "picture",
        "photo",
        "image_bytes",
        *IMAGE_SUFFIXES,
        "file_name",
        "filename",
        "image_path",
    ),
    "caption": ("caption", "captions", *TEXT_ONLY_NAMES, "description"),
    "sample_id": ("sample_id", "uid", "id"),
    "language": ("language", "lang", "locale"),
    "domain": ("domain",),
    "objects": ("objects", "object_names"),
    "boxes": ("boxes", "bboxes"),
    "questions": ("questions", "qa"),
}
"""Field of `Columns` → names to look for, the likeliest first, compared without case."""

ACCEPTED: Mapping[str, tuple[Kind, ...]] = {
    "image": ("image", "bytes", "text"),
    "caption": ("text", "texts"),
    "sample_id": ("text", "number"),
    "language": ("text", "number"),
    "domain": ("text", "number"),
    "objects": ("texts", "text"),
    "boxes": ("boxes",),
    "questions": ("questions",),
    "labels": ("text", "number"),
}
"""Field of `Columns` → what its column may hold."""


OPTIONS = {"sample_id": "id", "labels": "label"}
"""Field of `Columns` → its word in `--WORD-column`, where that is another."""


def detect(found: Mapping[str, Kind], asked: Columns, where: str, captions: bool = True) -> Columns:
    """Return the columns to read of those `found`, which maps a name to what the column holds.

    A column asked for must be there and hold the right thing; the others are found by their usual names, and the
    image also by its type. Data without an image is accepted as text-only when its text column is called `text` or was
    asked for; data without captions only if `captions` is false.
    Raises `InputError` naming `where`, the columns there are, and the option that fixes it.
    """
    chosen: dict[str, str | None] = {field: _choose(field, found, asked, where) for field in USUAL_NAMES}
    for label in asked.labels:
        _check("labels", label, found, where)
    have = f"{where} has the columns {', '.join(found) or 'none'}"
    if chosen["image"] is None and chosen["caption"] is None:
        raise InputError(
            f"no image and no caption column: {have}; name them: --image-column NAME --caption-column NAME"
        )
    if chosen["caption"] is None and captions:
        raise InputError(f"no caption column: {have}{_unfit('caption', found)}; name it: --caption-column NAME")
    if chosen["image"] is None:
        text_only = asked.image == OFF or asked.caption is not None
        if not text_only and str(chosen["caption"]).lower() not in TEXT_ONLY_NAMES:
            unfit = _unfit("image", found)
            raise InputError(
                f"no image column: {have}{unfit}; name it: --image-column NAME (text without images: {OFF})"
            )
    return asked.model_copy(update=chosen)


def kind_of_value(value: Any) -> Kind:
    """Return what a column holds, judged by one of its values; a string that is a JSON list counts as that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "text"
    match value:
        case None | [] | "":
            return "unknown"
        case bool() | int() | float():
            return "number"
        case str():
            return "text"
        case bytes():
            return "bytes"
        case {"bytes": _} | {"path": _}:
            return "image"
        case [str(), *_]:
            return "texts"
        case [{"question": _, "answer": _}, *_] | [[str(), str()], *_]:
            return "questions"
        case [[int() | float(), *_], *_]:
            return "boxes"
    return "other"


def kinds_of_records(records: Iterable[Mapping[str, Any]]) -> dict[str, Kind]:
    """Return what each column holds, by its first value in `records` that tells."""
    kinds: dict[str, Kind] = {}
    for record in records:
        for name, value in record.items():
            if kinds.get(name, "unknown") == "unknown":
                kinds[name] = kind_of_value(value)
    return kinds


def _choose(field: str, found: Mapping[str, Kind], asked: Columns, where: str) -> str | None:
    name: str | None = getattr(asked, field)
    if name is not None:
        if name == OFF and name not in found:
            return None
        _check(field, name, found, where)
        return name
    fitting = [name for name, kind in found.items() if kind in (*ACCEPTED[field], "unknown")]
    for usual in USUAL_NAMES[field]:
        for name in fitting:
            if name.lower() == usual and name not in asked.labels:
                return name
    pictures = [name for name, kind in found.items() if kind == "image"]
    return pictures[0] if field == "image" and len(pictures) == 1 else None


def _unfit(field: str, found: Mapping[str, Kind]) -> str:
    """Return what is wrong with a column that has one of a field's usual names, to be added to a message."""
    for name, kind in found.items():
        if name.lower() in USUAL_NAMES[field] and kind not in (*ACCEPTED[field], "unknown"):
            return f", but {name!r} holds {kind}, not {' or '.join(ACCEPTED[field])}"
    return ""


def _check(field: str, name: str, found: Mapping[str, Kind], where: str) -> None:
    option = f"--{OPTIONS.get(field, field)}-column"
    if name not in found:
        raise InputError(f"{option}: {where} has no column {name!r}; it has {', '.join(found) or 'none'}")
    if found[name] not in (*ACCEPTED[field], "unknown"):
        raise InputError(
            f"{option}: column {name!r} of {where} holds {found[name]}; it must hold {' or '.join(ACCEPTED[field])}"
        )
