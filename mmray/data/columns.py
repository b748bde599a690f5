"""Which columns hold the image, the caption and the rest: named by the user, or found by their usual names."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mmray.data.samples import BACKGROUND
from mmray.errors import InputError

Kind = Literal["text", "number", "bytes", "image", "texts", "boxes", "questions", "answers", "unknown", "other"]
"""What a column holds, by its type or first values; `unknown` (only nulls seen) fits everywhere."""

OFF = "none"
"""As a column's name: don't use such a column, even if there is one."""


class Columns(BaseModel):
    """Columns of the data by name, and how images are read.

    A column not given is found by its usual names; `none` turns it off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image: str | None = None
    """Column of the image: encoded bytes, a struct of bytes and path, or a path below the data's folder."""
    caption: str | None = None
    """Column of the caption; each caption of a list is a sample of the image."""
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
    question: str | None = None
    """Column of a question about the image, in data without captions."""
    answers: str | None = None
    """Column of the answers to that question: one, or a list of those that several people gave."""
    caption_language: str | None = None
    """Not a column: the language of captions whose row names none."""
    labels: tuple[str, ...] = ()
    """Further columns whose values label a sample."""
    background: str = BACKGROUND
    """Colour behind transparent pixels."""

    def used(self) -> tuple[str, ...]:
        """Return the names of the columns to read, each once, in a fixed order."""
        named = [getattr(self, field) for field in FIELDS if field != "labels"]
        return tuple(dict.fromkeys(name for name in [*named, *self.labels] if name is not None))


IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
TEXT_ONLY_NAMES = ("text", "sentence", "sentences", "txt")

IMAGE_NAMES = (
    *("image", "img", "picture", "photo", "image_bytes"),
    *IMAGE_SUFFIXES,
    *("file_name", "filename", "image_path"),
)

FIELDS: Mapping[str, tuple[tuple[Kind, ...], tuple[str, ...]]] = {
    "image": (("image", "bytes", "text"), IMAGE_NAMES),
    "caption": (("text", "texts"), ("caption", "captions", *TEXT_ONLY_NAMES, "description")),
    "sample_id": (("text", "number"), ("sample_id", "uid", "id")),
    "language": (("text", "number"), ("language", "lang", "locale")),
    "domain": (("text", "number"), ("domain",)),
    "objects": (("texts", "text"), ("objects", "object_names")),
    "boxes": (("boxes",), ("boxes", "bboxes")),
    "questions": (("questions",), ("questions", "qa")),
    "question": (("text",), ("question",)),
    "answers": (("texts", "answers", "text"), ("answers", "answer")),
    # No usual names: only the user knows which columns are labels.
    "labels": (("text", "number"), ()),
}
"""Field of `Columns` → what its column may hold, and its usual names, most likely first, compared without case."""

OPTIONS = {"sample_id": "id", "labels": "label"}
"""Field of `Columns` → WORD in `--WORD-column`, where the two differ."""


def detect(found: Mapping[str, Kind], requested: Columns, where: str, captions: bool = True) -> Columns:
    """Return the columns to read, out of those `found` (name → what it holds).

    A requested column must exist and hold the right thing. Others are found by their usual names, the image also by
    its type. Data without an image counts as text-only if its text column was requested or is called `text`; data
    without captions is accepted if it has questions with answers, or if `captions` is false. Questions with answers are
    used only where no captions are.
    Raises `InputError` naming `where`, the existing columns, and the option that fixes it.
    """
    single = [field for field in FIELDS if field != "labels"]
    chosen: dict[str, str | None] = {field: _choose(field, found, requested, where) for field in single}
    for label in requested.labels:
        _check("labels", label, found, where)
    answered = chosen["question"] is not None and chosen["answers"] is not None
    # Next to captions, as their prompt, a question would change every result.
    if not answered or chosen["caption"] is not None:
        chosen["question"] = chosen["answers"] = None
    have = f"{where} has the columns {', '.join(found) or 'none'}"
    if chosen["image"] is None and chosen["caption"] is None and not answered:
        raise InputError(
            f"no image and no caption column: {have}; name them: --image-column NAME --caption-column NAME"
        )
    if chosen["caption"] is None and captions and not answered:
        raise InputError(f"no caption column: {have}{_unfit('caption', found)}; name it: --caption-column NAME")
    if chosen["image"] is None:
        # Not simply any data without images: more often the image column has an unusual name. Who turns images off, or
        # names the caption column, means text.
        text_only = requested.image == OFF or requested.caption is not None
        if not text_only and str(chosen["caption"]).lower() not in TEXT_ONLY_NAMES:
            unfit = _unfit("image", found)
            raise InputError(
                f"no image column: {have}{unfit}; name it: --image-column NAME (text without images: {OFF})"
            )
    return requested.model_copy(update=chosen)


def kind_of_value(value: Any) -> Kind:
    """Return what a column holds, by one of its values; a string that is a JSON list counts as that list."""
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
        case [{"answer": _}, *_]:
            return "answers"
        case [[int() | float(), *_], *_]:
            return "boxes"
    return "other"


def kinds_of_records(records: Iterable[Mapping[str, Any]]) -> dict[str, Kind]:
    """Return what each column holds, by its first value in `records` that is not empty."""
    kinds: dict[str, Kind] = {}
    for record in records:
        for name, value in record.items():
            if kinds.get(name, "unknown") == "unknown":
                kinds[name] = kind_of_value(value)
    return kinds


def _choose(field: str, found: Mapping[str, Kind], requested: Columns, where: str) -> str | None:
    name: str | None = getattr(requested, field)
    if name is not None:
        if name == OFF and name not in found:
            return None
        _check(field, name, found, where)
        return name
    # A column of only nulls fits any field: its first rows may be empty.
    kinds, usual_names = FIELDS[field]
    fitting = [name for name, kind in found.items() if kind in (*kinds, "unknown")]
    # Most likely name first, whatever the order of the columns.
    for usual in usual_names:
        for name in fitting:
            if name.lower() == usual and name not in requested.labels:
                return name
    # An unusual name, but the only column of images.
    images = [name for name, kind in found.items() if kind == "image"]
    return images[0] if field == "image" and len(images) == 1 else None


def _unfit(field: str, found: Mapping[str, Kind]) -> str:
    """Return what is wrong with a column of a usual name, to add to a message; empty if there is none."""
    kinds, usual_names = FIELDS[field]
    for name, kind in found.items():
        if name.lower() in usual_names and kind not in (*kinds, "unknown"):
            return f", but {name!r} holds {kind}, not {' or '.join(kinds)}"
    return ""


def _check(field: str, name: str, found: Mapping[str, Kind], where: str) -> None:
    option = f"--{OPTIONS.get(field, field)}-column"
    if name not in found:
        raise InputError(f"{option}: {where} has no column {name!r}; it has {', '.join(found) or 'none'}")
    kinds, _ = FIELDS[field]
    if found[name] not in (*kinds, "unknown"):
        raise InputError(f"{option}: column {name!r} of {where} holds {found[name]}; it must hold {' or '.join(kinds)}")
