"""Columns are found by usual names and by what they hold; those asked for must be there."""

from typing import Any

import pytest

from mmray.data.arrow import kinds_of_schema
from mmray.data.columns import Columns, Kind, detect, kind_of_value, kinds_of_records
from mmray.errors import InputError
from tests.support.data_files import Row, table

PAIR: dict[str, Kind] = {"image": "image", "caption": "text"}


def test_types_and_values_agree(rows: list[Row]) -> None:
    by_type = kinds_of_schema(table(rows).schema)
    assert by_type == kinds_of_records(rows)
    assert by_type == {
        "sample_id": "text",
        "image": "image",
        "caption": "text",
        "language": "text",
        "domain": "text",
        "objects": "texts",
        "boxes": "boxes",
        "background": "text",
        "questions": "questions",
    }


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "unknown"),
        ("", "unknown"),
        ([], "unknown"),
        (True, "number"),
        (1.5, "number"),
        ("a", "text"),
        ("[Music] starts", "text"),
        ('["dog"]', "texts"),
        ("[[0.1, 0.2, 0.3, 0.4]]", "boxes"),
        ([["Is it?", "Yes"]], "questions"),
        (b"x", "bytes"),
        ({"path": "x"}, "image"),
        ({"category": [1]}, "other"),
        ([{"a": 1}], "other"),
        ([{"answer": "Yes", "answer_id": 1}], "answers"),
    ],
)
def test_kind_of_value(value: Any, kind: Kind) -> None:
    assert kind_of_value(value) == kind


@pytest.mark.parametrize(
    ("found", "field", "name"),
    [
        ({"IMG": "bytes", "text": "text"}, "image", "IMG"),
        ({"jpg": "bytes", "txt": "text"}, "caption", "txt"),
        ({"image": "number", "scan": "image", "caption": "text"}, "image", "scan"),
        (PAIR | {"text": "text"}, "caption", "caption"),
        (PAIR | {"lang": "text"}, "language", "lang"),
        (PAIR | {"objects": "other"}, "objects", None),
        (PAIR | {"questions": "text"}, "questions", None),
        (PAIR | {"objects": "unknown"}, "objects", "objects"),
        (PAIR | {"image_id": "number"}, "sample_id", None),
    ],
)
def test_found(found: dict[str, Kind], field: str, name: str | None) -> None:
    assert getattr(detect(found, Columns(), "here"), field) == name


def test_asked() -> None:
    found: dict[str, Kind] = PAIR | {"scan": "bytes", "alt": "text", "size": "number", "language": "text"}
    asked = Columns(image="scan", caption="alt", language="none", labels=("size",))
    assert detect(found, asked, "here") == asked.model_copy(update={"language": None})
    assert detect(found, Columns(image="none", caption="alt"), "here").image is None
    assert detect({"caption": "text", "x": "text"}, Columns(caption="caption"), "here").image is None


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        ({"a": "text"}, Columns(), "no image and no caption column: here has the columns a; .*--image-column NAME"),
        ({"image": "image"}, Columns(), "no caption column: here has the columns image; .*--caption-column NAME"),
        ({"caption": "text"}, Columns(), "no image column: here has the columns caption; .*--image-column NAME"),
        (PAIR, Columns(image="scan"), "--image-column: here has no column 'scan'; it has image, caption"),
        (PAIR, Columns(labels=("mood",)), "--label-column: here has no column 'mood'"),
        (PAIR, Columns(language="image"), "--language-column: column 'image' of here holds image; it must hold text"),
        (PAIR, Columns(image="none", caption="none"), "no image and no caption"),
    ],
)
def test_refused(found: dict[str, Kind], asked: Columns, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        detect(found, asked, "here")
    assert "\n" not in str(caught.value)


VQA: dict[str, Kind] = {"image": "image", "question": "text", "answers": "answers"}


@pytest.mark.parametrize(
    ("found", "requested", "columns"),
    [
        (VQA, Columns(), (None, "question", "answers")),
        (VQA | {"answers": "text"}, Columns(), (None, "question", "answers")),
        # Next to captions, questions are used only where these are turned off.
        (VQA | PAIR, Columns(), ("caption", None, None)),
        (VQA | PAIR, Columns(caption="none"), (None, "question", "answers")),
    ],
)
def test_a_question_with_answers_stands_for_a_caption(
    found: dict[str, Kind], requested: Columns, columns: tuple[str | None, ...]
) -> None:
    detected = detect(found, requested, "here")
    assert (detected.caption, detected.question, detected.answers) == columns


def test_a_question_without_answers_is_no_caption() -> None:
    with pytest.raises(InputError, match="no caption column"):
        detect({"image": "image", "question": "text"}, Columns(), "here")
    assert detect({"image": "image", "question": "text"}, Columns(), "here", captions=False).question is None


def test_captions_not_needed() -> None:
    assert detect({"image": "image"}, Columns(), "here", captions=False) == Columns(image="image")
