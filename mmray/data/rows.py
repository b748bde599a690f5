"""Turn one row of any source into a `Sample`, or into a `Failure` that says why not."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from mmray.data.columns import Columns, kind_of_value
from mmray.data.images import LARGEST_FILE
from mmray.data.samples import Failure, Sample, digest_id
from mmray.storage import too_large

logger = logging.getLogger(__name__)

Record = Mapping[str, Any] | str
"""A row by column name, or a string that says why the row could not be read."""

Image = bytes | tuple[str] | str | None
"""A row's image: bytes, its name as a tuple of one, a string that says why there is none, or None without images."""

Fetch = Callable[[list[str]], list[bytes | str]]
"""Image names → their bytes, or a string that says why there are none."""

ROWS_AT_ONCE = 32
LONGEST_ID = 1_024
"""Most bytes of a sample id: tables repeat it for every neuron, so a long one fills memory."""
HELD = 128 << 20
"""Bytes of images above which a batch of rows takes no further row."""
BOX_TOLERANCE = 0.5
"""How far a box may reach beyond the image, as a fraction of it. Boxes given in pixels exceed it by far."""


class BadRowError(ValueError):
    """Why one row is no sample."""


def samples(
    records: Iterable[tuple[str, Record]], columns: Columns, captions: bool, fetch: Fetch
) -> Iterator[Sample | Failure]:
    """Yield one `Sample` or `Failure` (stage `read`) for each record, in order.

    Records come with where they were read. Images given by name are fetched for up to ROWS_AT_ONCE rows together.
    With `captions` true, lists of captions must have been split before. Otherwise a list gives its first caption, and
    a missing caption becomes an empty one.
    """
    rows = (
        (source, record, None if isinstance(record, str) else _image(record, columns)) for source, record in records
    )
    while batch := list(_batch(rows)):
        images = [image for *_, image in batch]
        # Each image once: neighbouring rows often share one.
        names = list(dict.fromkeys(name for image in images if isinstance(image, tuple) for name in image))
        fetched = dict(zip(names, fetch(names), strict=True)) if names else {}
        for source, record, image in batch:
            try:
                yield _sample(
                    record, source, fetched[image[0]] if isinstance(image, tuple) else image, columns, captions
                )
            except BadRowError as error:
                yield Failure(_known_id(record, columns), source, "read", str(error))


def _batch(rows: Iterator[tuple[str, Record, Image]]) -> Iterator[tuple[str, Record, Image]]:
    held = 0
    for row in islice(rows, ROWS_AT_ONCE):
        yield row
        held += len(row[2]) if isinstance(row[2], bytes) else 0
        if held > HELD:
            return


def object_names(value: Any) -> tuple[str, ...]:
    """Return the object names in a cell that is a list, a JSON list or comma-separated; blank ones are left out.

    Raises `BadRowError`.
    """
    return tuple(name for name in _names(value) if name)


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [name for name in value.split(",") if name.strip()]
    return tuple(_text(name, "objects").strip() for name in _list(value, "objects"))


def _image(record: Mapping[str, Any], columns: Columns) -> Image:
    if columns.image is None:
        return None
    value = record.get(columns.image)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    match value:
        case bytes() if len(value) > LARGEST_FILE:
            return f"image: {too_large(len(value), LARGEST_FILE)}"
        case bytes() if value:
            return value
        case str() if value:
            return (value,)
        case None | b"" | "":
            return f"no image in column {columns.image!r}"
    return f"column {columns.image!r} holds {type(value).__name__}, not an image"


def _sample(record: Record, source: str, image: bytes | str | None, columns: Columns, captions: bool) -> Sample:
    if isinstance(record, str):
        raise BadRowError(record)
    if isinstance(image, str):
        raise BadRowError(image)
    sample_id = given_id(None if columns.sample_id is None else record.get(columns.sample_id))
    if len(sample_id.encode()) > LONGEST_ID:
        size = f"{len(sample_id.encode()):,} bytes"
        raise BadRowError(f"sample id of {size} in column {columns.sample_id!r}; at most {LONGEST_ID:,}")
    question, answers = _question(record, columns, captions)
    # Of the most frequent answers the first.
    caption = Counter(answers).most_common(1)[0][0] if answers else _caption(record, columns, captions)
    # Blank names are kept at first, because boxes are matched by index.
    objects = _optional(record, columns.objects, _names)
    return Sample(
        sample_id=sample_id or digest_id(image, caption if question is None else f"{question}\n{caption}"),
        source=source,
        image=image,
        caption=caption,
        language=_label(record, columns.language) or columns.caption_language,
        domain=_label(record, columns.domain),
        objects=None if objects is None else tuple(name for name in objects if name),
        boxes=_boxes_of(record, columns, objects),
        questions=_optional(record, columns.questions, _questions),
        question=question,
        answers=answers,
        labels={name: label for name in columns.labels if (label := _label(record, name)) is not None},
        background=columns.background,
        references=references(None if columns.caption is None else record.get(columns.caption)),
    )


def given_id(value: Any) -> str:
    """Return the sample id in a cell, or an empty string if there is none that tables can hold."""
    text = str(value) if isinstance(value, str | int | float) else ""
    return text if _storable(text) else ""


def _known_id(record: Record, columns: Columns) -> str:
    """Return the id to report a bad row by; empty if it has none, or one that is too long."""
    value = None if isinstance(record, str) or columns.sample_id is None else record.get(columns.sample_id)
    sample_id = given_id(value)
    return sample_id if len(sample_id.encode()) <= LONGEST_ID else ""


def _caption(record: Mapping[str, Any], columns: Columns, captions: bool) -> str:
    value = None if columns.caption is None else record.get(columns.caption)
    texts = captions_in(value)
    if len(texts) > 1 and captions:
        raise BadRowError("a list of captions, where the first rows of the data have one text each")
    # Several captions get here only if the model is to write its own.
    value = texts[0]
    if value is None or (isinstance(value, str) and not value.strip()):
        if captions:
            raise BadRowError(f"no caption in column {columns.caption!r}")
        return ""
    return _text(value, "caption")


def captions_in(cell: Any) -> list[Any]:
    """Return the captions in a cell: the non-empty ones of a list, or [None] if there are none."""
    if not isinstance(cell, list):
        return [cell]
    return [text for text in cell if text is not None and (not isinstance(text, str) or text.strip())] or [None]


def references(cell: Any) -> tuple[str, ...]:
    """Return the reference captions of a row's image, those of a list; a single text need not be all, so none."""
    return tuple(text for text in captions_in(cell) if isinstance(text, str)) if isinstance(cell, list) else ()


def label_text(value: Any, column: str) -> str | None:
    """Return the label in a cell, None for an empty one; raises `BadRowError`."""
    if value is None or value == "":
        return None
    return _text(str(value) if isinstance(value, bool | int | float) else value, column)


def _label(record: Mapping[str, Any], column: str | None) -> str | None:
    return None if column is None else label_text(record.get(column), column)


def _optional(record: Mapping[str, Any], column: str | None, read: Callable[[Any], Any]) -> Any:
    value = None if column is None else record.get(column)
    return None if value is None or value == "" else read(value)


def _boxes_of(record: Mapping[str, Any], columns: Columns, objects: tuple[str, ...] | None) -> Any:
    """Return the boxes of the objects that have a name, or None if the boxes can't be used."""
    # Only a warning: most analyses don't need boxes, so the sample is kept.
    try:
        boxes = _optional(record, columns.boxes, _boxes)
        if objects is None or boxes is None:
            return boxes
        if len(objects) != len(boxes):
            raise BadRowError(f"{len(objects)} objects and {len(boxes)} boxes")
    except BadRowError as error:
        _warn_of_boxes(str(columns.boxes), str(error))
        return None
    return tuple(box for name, box in zip(objects, boxes, strict=True) if name)


WARNED: set[str] = set()
"""Columns of boxes that this process has warned about, each once."""


def _warn_of_boxes(column: str, reason: str) -> None:
    if column not in WARNED:
        WARNED.add(column)
        logger.warning("column %r: %s; boxes that can't be used are left out, their samples kept", column, reason)


def _boxes(value: Any) -> tuple[tuple[float, ...], ...]:
    boxes = []
    for box in _list(value, "boxes"):
        numbers = [number for number in _list(box, "boxes") if isinstance(number, int | float)]
        inside = all(-BOX_TOLERANCE <= number <= 1 + BOX_TOLERANCE for number in numbers if math.isfinite(number))
        if len(numbers) != 4 or len(box) != 4 or not inside or not all(map(math.isfinite, numbers)):
            raise BadRowError(f"box {box} is not (x, y, width, height) in 0..1 of the image")
        boxes.append(tuple(float(number) for number in numbers))
    return tuple(boxes)


def _questions(value: Any) -> tuple[tuple[str, str], ...]:
    pairs = []
    for item in _list(value, "questions"):
        pair = [item.get("question"), item.get("answer")] if isinstance(item, Mapping) else item
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("questions must be pairs of question and answer; --questions-column none leaves them out")
        pairs.append((_text(pair[0], "questions"), _text(pair[1], "questions")))
    return tuple(pairs)


def _question(record: Mapping[str, Any], columns: Columns, needed: bool) -> tuple[str | None, tuple[str, ...]]:
    """Return the question about the image, and all answers that people gave; (None, ()) in data without.

    An answer may be missing where captions may.
    """
    if columns.question is None or columns.answers is None:
        return None, ()
    question = _optional(record, columns.question, lambda value: _text(value, "question").strip())
    answers = _optional(record, columns.answers, _answers)
    if needed and not (question and answers):
        column = columns.answers if question else columns.question
        raise BadRowError(f"no {'answer' if question else 'question'} in column {column!r}")
    return question or None, answers or ()


def _answers(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and kind_of_value(value) == "text":
        return (_text(value, "answers").strip(),)
    items = [item.get("answer") if isinstance(item, Mapping) else item for item in _list(value, "answers")]
    return tuple(text for item in items if (text := _text(item, "answers").strip()))


def _list(value: Any, name: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"{name}: not a JSON list ({error})") from error
    if not isinstance(value, list):
        raise BadRowError(f"{name}: {type(value).__name__} where a list was expected")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{name}: {type(value).__name__} where text was expected")
    if not _storable(value):
        raise BadRowError(f"{name}: not valid Unicode")
    return value


def _storable(text: str) -> bool:
    # JSON can spell a lone surrogate, which neither UTF-8 nor Parquet can hold.
    return not any("\ud800" <= character <= "\udfff" for character in text)
