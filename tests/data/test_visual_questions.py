"""Data of visual question answering: the question is the prompt, and the most frequent answer the caption."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmray.data.samples import Failure, Sample
from mmray.data.shards import cut, read_shard
from mmray.data.sources import open_source
from tests.support.data_files import read_all, write_parquet

ANSWERS: tuple[tuple[Any, tuple[str, ...], str], ...] = (
    (["a cat", "a dog", "a dog"], ("a cat", "a dog", "a dog"), "a dog"),
    ([{"answer": "one"}, {"answer": "two"}], ("one", "two"), "one"),
    ("yes", ("yes",), "yes"),
    ("[unclear]", ("[unclear]",), "[unclear]"),
    (json.dumps(["no", "no"]), ("no", "no"), "no"),
)


def rows_with(rows: list[dict[str, Any]], **facts: Any) -> list[dict[str, Any]]:
    """Return rows with a question in place of the caption, as people's data has them."""
    kept = ("image", "domain")
    return [{name: row[name] for name in kept} | {"question": f"What is {n}?"} | facts for n, row in enumerate(rows)]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    return str(write_parquet(folder, rows))


@pytest.mark.parametrize(("cell", "answers", "caption"), ANSWERS)
def test_a_question_is_what_the_caption_answers(
    tmp_path: Path, rows: list[dict[str, Any]], cell: Any, answers: tuple[str, ...], caption: str
) -> None:
    read = read_all(write(tmp_path, rows_with(rows, answers=cell)))
    assert len(read) == len(rows)
    for number, sample in enumerate(read):
        assert isinstance(sample, Sample)
        assert (sample.question, sample.answers, sample.caption) == (f"What is {number}?", answers, caption)
        assert sample.asked(None) == f"What is {number}?"
        assert sample.asked("In one word.") == f"What is {number}?\nIn one word."
        assert sample.domain == rows[number]["domain"]


def test_questions_about_one_image_are_samples_of_their_own(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    same = [rows[0]] * 3
    read = read_all(write(tmp_path, rows_with(same, answers="yes")))
    samples = [sample for sample in read if isinstance(sample, Sample)]
    assert len({sample.sample_id for sample in samples}) == 3
    assert len({sample.image_key for sample in samples}) == 1


def test_rows_without_a_question_or_an_answer_are_failures(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    some = rows_with(rows[:3], answers=["yes"])
    some[0]["question"], some[1]["answers"] = " ", []
    read = read_all(write(tmp_path, some))
    assert [row.message for row in read if isinstance(row, Failure)] == [
        "no question in column 'question'",
        "no answer in column 'answers'",
    ]
    assert isinstance(read[2], Sample)


def test_a_model_that_writes_its_own_answers_needs_none(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    # Of a test split, whose answers are not public.
    source = open_source(write(tmp_path, rows_with(rows[:3], answers=[""])), captions=False)
    (shard,) = cut(source.files(), 3, 3).shards
    samples = [row for row in read_shard(source, shard) if isinstance(row, Sample)]
    assert [(one.question, one.answers, one.caption) for one in samples] == [
        (f"What is {n}?", (), "") for n in range(3)
    ]


def test_samples_of_captions_are_asked_the_prompt() -> None:
    assert Sample("a", "here", None, "A dog.").asked("What?") == "What?"
    assert Sample("a", "here", None, "A dog.").asked(None) is None
