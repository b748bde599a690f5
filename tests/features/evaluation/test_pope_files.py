"""An edit on POPE's released questions: the figures of POPE's own evaluation of the model's answers, file by file."""

import json

import pytest

from mmray.errors import InputError
from mmray.features.evaluation.evaluate import evaluate
from mmray.features.evaluation.pope import open_pope
from mmray.features.evaluation.settings import measure_settings
from mmray.objects.prompts import presence
from tests.support.standin import swap


@pytest.fixture(scope="module")
def released(tmp_path_factory, scenes):
    """Files of two strategies about four images, and the folder of the images."""
    folder = tmp_path_factory.mktemp("pope")
    (folder / "val2014").mkdir()
    asked = {"random": ["zebra", "sun"], "popular": ["sun", "hammer"]}
    files = []
    for strategy, others in asked.items():
        lines = []
        for number, sample in enumerate(scenes[:4]):
            name = f"COCO_val2014_{number:012}.jpg"
            (folder / "val2014" / name).write_bytes(sample.image)
            for word in [*sample.objects[:1], *(other for other in others if other not in sample.objects)]:
                label = "yes" if word in sample.objects else "no"
                lines.append({"question_id": len(lines) + 1, "image": name, "text": presence(word), "label": label})
        files.append(folder / f"coco_pope_{strategy}.json")
        files[-1].write_text("\n".join(map(json.dumps, lines)))
    return [str(file) for file in files], str(folder / "val2014")


def published(answers, labels):
    """Return the figures of POPE's released evaluation: yes unless the first sentence has No, no or not."""
    said = []
    for answer in answers:
        words = answer.split(".")[0].replace(",", "").split(" ")
        said.append("no" if "No" in words or "not" in words or "no" in words else "yes")
    pairs = list(zip(said, labels, strict=True))
    count = {(one, other): pairs.count((one, other)) for one in ("yes", "no") for other in ("yes", "no")}
    precision = count["yes", "yes"] / (count["yes", "yes"] + count["yes", "no"])
    recall = count["yes", "yes"] / (count["yes", "yes"] + count["no", "yes"])
    return {
        "accuracy": (count["yes", "yes"] + count["no", "no"]) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": said.count("yes") / len(said),
    }


def test_figures_are_those_of_the_released_evaluation(before, scenes, released):
    files, images = released
    settings = measure_settings(
        pope=files, pope_images=images, pope_parser="released", pope_objects=0, text_count=0, draws=20, bleu=False
    )
    word = scenes[0].objects[0]
    edit = swap(word, "zebra")
    found = evaluate(before.model, edit, scenes[:1], settings, baseline=before).measures
    for file, strategy in zip(files, ("random", "popular"), strict=True):
        lines = [json.loads(line) for line in open(file)]  # noqa: PTH123, SIM115
        pictures = {line["image"]: before.image(scenes[int(line["image"][-16:-4])]) for line in lines}
        answers = [before.model.generate([pictures[line["image"]]], line["text"])[0] for line in lines]
        expected = published(answers, [line["label"] for line in lines])
        for figure, value in expected.items():
            row = found[f"pope_{strategy}_{figure}"]
            assert row["before"] == pytest.approx(value), (strategy, figure)
            assert row["n"] == 4 and "released questions and labels" in row["protocol"]
    assert found["pope_yes_ratio_change"]["n"] == 4


def test_an_image_that_is_missing_costs_its_own_questions(before, released, tmp_path):
    files, images = released
    with pytest.raises(InputError, match="no image such as COCO_val2014_0"):
        open_pope(files, str(tmp_path))
    lines = [json.loads(line) for line in open(files[0])]  # noqa: PTH123, SIM115
    (tmp_path / "mine.json").write_text("\n".join(map(json.dumps, [*lines, lines[0] | {"image": "none.jpg"}])))
    settings = measure_settings(
        pope=[str(tmp_path / "mine.json")], pope_images=images, pope_objects=0, text_count=0, draws=20, bleu=False
    )
    done = evaluate(before.model, swap("zebra", "sun"), [], settings, baseline=before)
    assert [row["sample_id"] for row in done.errors.to_pylist()] == ["pope: none.jpg"]
    assert done.measures["pope_file_accuracy"]["n"] == 4
