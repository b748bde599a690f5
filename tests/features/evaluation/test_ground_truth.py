"""What is in an image: annotated, named by its captions, or both; in the questions, in CHAIR and in the claims."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmray.data.samples import Sample
from mmray.data.sources import open_source
from mmray.errors import InputError
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.evaluate import evaluate
from mmray.features.evaluation.settings import measure_settings
from mmray.objects.ground_truth import survey, with_ground_truth
from mmray.objects.lexicon import ObjectLexicon
from mmray.objects.statistics import gather_statistics
from mmray.objects.words import COCO, NONE, coco_words
from tests.support.chair_reference import reference
from tests.support.data_files import read_all, write_coco, write_csv, write_jsonl, write_parquet, write_tar
from tests.support.standin import swap

SAID = (
    "A man with his puppy",
    "Two kittens on a couch",
    "A baby elephant near train tracks",
    "A bus, nothing else",
    "Someone skiing",
    "A table and a chair",
)
SHARED = {"cat", "dog", "pizza", "car", "boat", "apple"}
"""Objects of the demo's scenes that COCO has too; the others are left out."""


@pytest.fixture(scope="module")
def images(all_scenes: list[Sample]) -> list[dict[str, Any]]:
    """Each image's objects, and its five captions: of the demo's scenes those with an object of COCO's."""
    generator = random.Random(0)
    found = []
    for sample in all_scenes:
        pairs = [(n, b) for n, b in zip(sample.objects or (), sample.boxes or (), strict=True) if n in SHARED]
        if pairs and sample.image is not None:
            objects, boxes = zip(*pairs, strict=True)
            captions = generator.sample(SAID, 5) if len(found) % 4 else []
            found.append({"image": {"bytes": sample.image}, "objects": objects, "boxes": boxes, "captions": captions})
    assert len(found) >= 8
    return found[:8]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory, images: list[dict[str, Any]]) -> Path:
    """COCO with five captions an image, of some images none."""
    file = write_coco(tmp_path_factory.mktemp("coco"), [image | {"caption": ""} for image in images])
    content = json.loads(file.read_text())
    content["annotations"] = [
        {"id": 10 * number + place, "image_id": number, "caption": caption}
        for number, image in enumerate(images, 1)
        for place, caption in enumerate(image["captions"])
    ]
    file.write_text(json.dumps(content))
    return file


def truth_of(image: dict[str, Any], kind: str) -> set[str] | None:
    """The rule, by the independent implementation of what a caption names."""
    named = {name for caption in image["captions"] for name in reference().mentions(caption)}
    if kind == "captions":
        return named if image["captions"] else None
    return set(image["objects"]) | (named if kind == "union" else set())


@pytest.mark.parametrize("captions", [True, False])
def test_coco_hands_on_every_caption_of_an_image(coco: Path, images: list[dict[str, Any]], captions: bool) -> None:
    rows = [row for row in read_all(str(coco), captions=captions) if isinstance(row, Sample)]
    counts = Counter(image_of(row) for row in rows)
    for number, image in enumerate(images, 1):
        own = [row for row in rows if image_of(row) == number]
        assert all(row.references == tuple(image["captions"]) for row in own)
        assert [row.caption for row in own] == (image["captions"] if captions else [""])
        assert counts[number] == (len(image["captions"]) if captions else 1)


def image_of(sample: Sample) -> int:
    return int(sample.sample_id.partition("-")[0])


@pytest.mark.parametrize("kind", ["instances", "captions", "union"])
def test_ground_truth_by_name(coco: Path, images: list[dict[str, Any]], kind: Any) -> None:
    source = open_source(str(coco), captions=False)
    found = survey(source, kind, None)
    assert (found.ground_truth, found.synonyms) == (kind, COCO)
    truths = [truth_of(image, kind) for image in images]
    assert found.statistics.counts == Counter(name for truth in truths for name in truth or ())
    lexicon = ObjectLexicon(found.statistics.vocabulary, {}, coco_words())
    for sample, image, truth in zip(read_all(str(coco), captions=False), images, truths, strict=True):
        assert isinstance(sample, Sample)
        there = with_ground_truth(sample, kind, lexicon, found.statistics.references)
        assert (None if there.objects is None else set(there.objects)) == truth
        boxes = dict(zip(there.objects or (), there.boxes or (), strict=False))
        assert boxes.keys() == set(image["objects"]) & (truth or set())
        assert all(boxes[name] in (sample.boxes or ()) for name in boxes)


def test_the_union_is_the_default_where_captions_are_at_hand(coco: Path, images: list[dict[str, Any]]) -> None:
    found = survey(open_source(str(coco), captions=False), None, None)
    assert (found.ground_truth, found.synonyms) == ("union", COCO)
    assert found == survey(open_source(str(coco), captions=False), "union", "coco")
    # What no table lists is known by the data's own names alone.
    bare = survey(open_source(str(coco), captions=False), None, NONE).statistics
    assert set(bare.vocabulary) == {name for image in images for name in image["objects"]}


def test_without_captions_or_without_objects(coco: Path, tmp_path: Path, images: list[dict[str, Any]]) -> None:
    demo = open_source("demo", captions=False)
    assert (survey(demo, None, None).ground_truth, survey(demo, None, None).synonyms) == ("instances", NONE)
    bare = write_parquet(tmp_path / "bare", [{key: image[key] for key in ("image", "objects")} for image in images])
    for kind in ("captions", "union"):
        with pytest.raises(InputError, match=f"--ground-truth {kind}: .* has no captions; give instances"):
            survey(open_source(str(bare), captions=False), kind, None)
    alone = write_coco(tmp_path, [image | {"caption": SAID[0]} for image in images])
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    source = open_source(str(alone), captions=False)
    assert survey(source, None, None).statistics == gather_statistics(())
    assert set(survey(source, "captions", None).statistics.vocabulary) == {"person", "dog"}
    with pytest.raises(InputError, match="has no objects"):
        survey(source, "union", None)


def write_tars(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one tar whose json members hold the captions."""
    named = [(f"{number:04}", row) for number, row in enumerate(rows)]
    return write_tar(
        folder / "data.tar",
        [
            member
            for name, row in named
            for member in (
                (f"{name}.jpg", row["image"]["bytes"]),
                (f"{name}.json", json.dumps({key: row[key] for key in row if key != "image"}).encode()),
            )
        ],
    )


LISTS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "parquet": write_parquet,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tars": write_tars,
}
"""Forms of data whose caption column can hold lists, or one caption per row."""


@pytest.mark.parametrize("form", LISTS)
def test_rows_with_lists_of_captions_give_what_coco_gives(
    coco: Path, images: list[dict[str, Any]], tmp_path: Path, form: str
) -> None:
    listed = [image | {"caption": image["captions"]} for image in images]
    source = open_source(str(LISTS[form](tmp_path / form, without(listed))), captions=False)
    found = survey(source, None, None)
    assert found == survey(open_source(str(coco), captions=False), None, None)
    assert found.ground_truth == "union"
    rows = [row for row in read_all(source.data, captions=False) if isinstance(row, Sample)]
    assert [list(row.references) for row in rows] == [image["captions"] for image in images]


@pytest.mark.parametrize("form", LISTS)
@pytest.mark.parametrize("kind", ["captions", "union"])
def test_captions_in_rows_of_their_own_are_brought_together_by_their_image(
    images: list[dict[str, Any]], tmp_path: Path, form: str, kind: Any
) -> None:
    # In no order: rows of an image need not be neighbours.
    exploded = [image | {"caption": caption} for image in images for caption in image["captions"]]
    random.Random(1).shuffle(exploded)
    source = open_source(str(LISTS[form](tmp_path / form, without(exploded))), captions=False)
    assert survey(source, None, None).ground_truth == "instances"
    found = survey(source, kind, None)
    truths = {image["image"]["bytes"]: truth_of(image, kind) for image in images}
    lexicon = ObjectLexicon(found.statistics.vocabulary, {}, coco_words())
    rows = [row for row in read_all(source.data, captions=False) if isinstance(row, Sample)]
    assert len(rows) == len(exploded)
    for row in rows:
        assert row.image is not None
        truth = with_ground_truth(row, kind, lexicon, found.statistics.references)
        assert set(truth.objects or ()) == truths[row.image]
    assert found.statistics.counts == Counter(name for row in rows for name in truths[row.image or b""] or ())


def without(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what is not a column of the data (a second one of captions), and write objects as lists."""
    return [{key: row[key] for key in row if key != "captions"} | {"objects": list(row["objects"])} for row in rows]


@pytest.mark.parametrize("kind", ["captions", "union"])
def test_an_evaluation_of_exploded_rows_is_that_of_the_independent_chair(
    demo: Any, before: BaselineReplies, images: list[dict[str, Any]], tmp_path: Path, kind: Any
) -> None:
    # Of few images: the model captions each of their rows.
    exploded = [image | {"caption": caption} for image in images[:3] for caption in image["captions"]]
    path = write_parquet(tmp_path, without(exploded))
    samples = read_all(str(path), captions=False)
    settings = measure_settings(text_count=0, draws=5, bleu=False, pope_objects=0, ground_truth=kind, synonyms=COCO)
    facts = survey(open_source(str(path), captions=False), kind, None).statistics
    truths = {image["image"]["bytes"]: truth_of(image, kind) for image in images}
    by_name = {row.sample_id: truths[row.image or b""] or set() for row in samples if isinstance(row, Sample)}
    # In a job the facts are of the whole data, whatever part of it is at hand; in one process the samples give them.
    before.clear()
    for known in (facts, None):
        found = evaluate(demo, swap("cat", "owl"), samples, settings, baseline=before, statistics=known)
        texts = {row["sample_id"]: row["before"] for row in found.captions.to_pylist()}
        sentences, mentions = reference().chair([texts[name] for name in by_name], list(by_name.values()))
        assert found.measures["chair_s"]["before"] == pytest.approx(sentences)
        assert found.measures["chair_i"]["before"] == pytest.approx(mentions)
    before.clear()


@pytest.mark.parametrize("kind", ["instances", "captions", "union"])
def test_an_evaluation_on_coco_is_that_of_the_independent_chair(
    demo: Any, before: BaselineReplies, coco: Path, images: list[dict[str, Any]], kind: Any
) -> None:
    samples = read_all(str(coco), captions=False)
    facts = survey(open_source(str(coco), captions=False), kind, None).statistics
    settings = measure_settings(text_count=0, draws=5, bleu=False, pope_objects=1, ground_truth=kind, synonyms=COCO)
    before.clear()
    found = evaluate(demo, swap("cat", "owl"), samples, settings, baseline=before, statistics=facts)
    before.clear()
    texts = {row["sample_id"]: row for row in found.captions.to_pylist()}
    truths = {str(number): truth_of(image, kind) for number, image in enumerate(images, 1)}
    known = {name: truth for name, truth in truths.items() if truth is not None}
    for side in ("before", "after"):
        sentences, mentions = reference().chair([texts[name][side] for name in known], list(known.values()))
        assert found.measures["chair_s"][side] == pytest.approx(sentences)
        assert found.measures["chair_i"][side] == pytest.approx(mentions)
    assert {"instances": "annotated", "captions": "captions", "union": "or its captions"}[kind] in (
        found.measures["chair_i"]["protocol"]
    )
    # The edit is about an owl, which CHAIR goes on calling a bird.
    assert any("owl" in text["after"] for text in texts.values())
    # POPE asks by the same ground truth.
    some = [truth for truth in known.values() if truth and truth < set(facts.vocabulary)]
    assert found.measures["pope_random_recall"]["n"] == len(some) > 0
