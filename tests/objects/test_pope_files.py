"""POPE's released question files, read as they are, and what other files are told."""

import json

import pytest

from mmray.errors import InputError
from mmray.objects.pope_files import PopeQuestion, keys, read_pope

IMAGE = "COCO_val2014_000000016631.jpg"
LINES = [
    {"question_id": 1, "image": IMAGE, "text": "Is there a person in the image?", "label": "yes"},
    {"question_id": 2, "image": IMAGE, "text": "Is there an traffic light in the image?", "label": "no"},
    {"question_id": 3, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a cup in the image?", "label": "no"},
]


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(path)


def test_lines_are_questions_by_image_with_the_strategy_of_the_file(tmp_path):
    files = [write(tmp_path / f"coco_pope_{name}.json", LINES) for name in ("random", "adversarial")]
    found = read_pope([*files, write(tmp_path / "mine.json", LINES[2:])])
    assert found.folder == str(tmp_path)
    assert [name for name, _ in found.images] == [IMAGE, LINES[2]["image"]]
    (_, first), (_, second) = found.images
    assert first[:2] == (
        PopeQuestion("random", LINES[0]["text"], True),
        PopeQuestion("random", LINES[1]["text"], False),
    )
    assert [question.strategy for question in first] == ["random"] * 2 + ["adversarial"] * 2
    assert [question.strategy for question in second] == ["random", "adversarial", "file"]
    assert [question.thing for question in first[:2]] == ["person", "traffic light"]
    assert PopeQuestion("file", "Do you see a dog?", True).thing == "Do you see a dog?"


def test_an_image_is_known_by_file_and_by_coco_s_number(tmp_path):
    found = read_pope([write(tmp_path / "coco_pope_random.json", LINES)]).by_key()
    for key in (IMAGE, "COCO_val2014_000000016631", "16631"):
        assert len(found[key]) == 2
    assert keys("val/dog.png") == ("val/dog.png", "dog.png", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no question in it"),
        (json.dumps(LINES[0]) + "\n\nyes?\n", "line 3: not a question"),
        (json.dumps([1]), "line 1: not a question"),
        (json.dumps(LINES[0] | {"label": "maybe"}), "line 1: not a question"),
        (json.dumps({"image": IMAGE, "text": 3, "label": "no"}), "line 1: not a question"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "pope.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_pope([str(tmp_path / "pope.json")])
    with pytest.raises(InputError, match="no such file"):
        read_pope([str(tmp_path / "none.json")])
