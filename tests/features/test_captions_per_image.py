"""With five captions per image every analysis counts images, not captions: measures, hold-outs, intervals, pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmray.data.image_keys import image_key, image_keys, one_per_image
from mmray.data.samples import Sample, image_digest
from mmray.engine import run as run_job
from mmray.features.editing.dataset import EditDataset, replaced
from mmray.features.editing.edit import Purpose, open_edit
from mmray.features.editing.kept_answers import kept
from mmray.features.editing.methods import make_edit
from mmray.features.editing.reduction_samples import own_captions
from mmray.features.editing.settings import edit_settings
from mmray.features.evaluation.edit_requests import EDITED, requests_of, scope_of
from mmray.features.evaluation.job import EvaluationJob
from mmray.features.evaluation.settings import evaluation_settings
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.settings import hallucination_settings
from mmray.features.properties.plan import plan_properties
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.job import plan_saliency
from mmray.features.saliency.settings import saliency_settings
from mmray.features.saliency.summary import summarise_saliency
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.plan import plan_labels
from mmray.features.selectivity.settings import selectivity_settings
from mmray.objects.lexicon import ObjectLexicon
from mmray.report.content import gather
from mmray.runs.run import Run, open_run
from tests.support.coco_like import CAPTIONS, CocoLike
from tests.support.data_files import read_all
from tests.support.local_jobs import KEPT_TEXT, census_here, properties_here

ASKED = {"concepts": 2, "images": 4, "maps": 3, "min_occurrences": 4, "longest": 8, "draws": 50}
SOURCE = "hammer"


@pytest.fixture(scope="module")
def run(coco_run: Path) -> Run:
    return open_run(coco_run)


@pytest.fixture(scope="module")
def images(run: Run) -> dict[str, str]:
    return image_keys(run.table("captions"))


@pytest.fixture(scope="module")
def dataset(open_model: Callable[[str], Any], run: Run) -> EditDataset:
    return EditDataset(open_model("demo"), run)


@pytest.fixture(scope="module")
def edit(dataset: EditDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slight edit of the run; what it does is of no interest, what it learnt on is."""
    folder = tmp_path_factory.mktemp("edit") / "swap"
    wish = edit_settings(
        {
            "source": SOURCE,
            "target": "dog",
            "samples": 3,
            "kept": 6,
            "neurons": 20,
            "language": "en",
            "keep_text": KEPT_TEXT,
        }
    )
    make_edit(dataset, [wish]).save(folder)
    return folder


def distinct(samples: list[str], images: Mapping[str, str]) -> bool:
    return len({images[name] for name in samples}) == len(samples)


def samples_of(path: Path) -> list[Sample]:
    return [row for row in read_all(str(path), captions=False) if isinstance(row, Sample)]


def test_a_key_is_the_image_s_digest_or_the_sample_s_own_id() -> None:
    captions = pa.table({"sample_id": ["a", "b", "c", "d"], "image": pa.array(["x", "x", None, "y"])})
    keys = image_keys(captions)
    assert keys == {"a": "x", "b": "x", "c": "c", "d": "y"}
    assert keys == {row["sample_id"]: image_key(row["sample_id"], row["image"]) for row in captions.to_pylist()}
    assert one_per_image(["d", "b", "a", "c", "c", "unknown"], keys) == ["d", "b", "c", "unknown"]
    assert image_keys(captions.select(["sample_id"])) == {name: name for name in "abcd"}
    sample = Sample("a", "there", b"pixels", "A dog.")
    assert sample.image_key == image_digest(b"pixels")
    assert replace(sample, image=None).image_key == "a"


def test_properties_are_of_as_many_images_as_they_say(
    coco: CocoLike, run: Run, images: dict[str, str], tmp_path: Path
) -> None:
    """And the same images with one caption each are about as alike."""
    assert len(run.table("captions")) == CAPTIONS * coco.images
    assert properties_here(run.uri, **ASKED).complete
    invariance = (
        "select concept, value, n from properties where property = 'image_invariance' and measure = 'jaccard' "
        "and method = 'contribution' and neurons = 10 order by concept"
    )
    found = run.sql(invariance).to_pylist()
    assert [row["n"] for row in found if row["concept"]] == [ASKED["images"]] * 2
    census_here("demo", str(coco.single), tmp_path / "single", shard_size=60)
    properties_here(tmp_path / "single", **ASKED, only="properties")
    single = open_run(tmp_path / "single").sql(invariance).to_pylist()
    assert [row["concept"] for row in found] == [row["concept"] for row in single]
    for five, one in zip(found, single, strict=True):
        assert five["value"] == pytest.approx(one["value"], abs=0.12), five["concept"]
    # Concepts share images: over all of them each counts once.
    units = plan_properties(property_settings({"run": run.uri, **ASKED}), run).units
    own = [name for unit in units for facts in unit.payload for name in facts.own]
    (whole,) = (row for row in found if row["concept"] is None)
    assert whole["n"] == len({images[name] for name in own}) < len(own)


def test_figures_of_ranked_neurons_say_that_they_are_in_sample(run: Run) -> None:
    rows = run.sql("select distinct property, method, protocol from properties").to_pylist()
    by_method = {(row["property"], row["method"]): row["protocol"].startswith("in-sample") for row in rows}
    for name in ("sensitivity", "specificity", "causal", "localisation"):
        assert by_method[name, "score"]
        assert by_method[name, "specific"]
        assert not by_method[name, "layer-matched"]
    assert not by_method["image_invariance", "contribution"]
    assert not by_method["localisation", "chance"]


def test_maps_and_pictures_of_a_concept_are_of_different_images(run: Run, images: dict[str, str]) -> None:
    maps: dict[str, set[str]] = {}
    for row in run.table("heatmaps").to_pylist():
        maps.setdefault(row["concept"], set()).add(row["sample_id"])
    assert len(maps[SOURCE]) == ASKED["maps"]
    content = gather(run)
    for name, page in content.concepts.items():
        shown = [row["id"] for row in page["samples"]]
        assert maps[name] <= set(shown)
        assert distinct(shown, images), name
    assert len(content.concepts[SOURCE]["samples"]) > ASKED["maps"]


def test_saliency_is_of_different_images_and_its_intervals_too(run: Run, images: dict[str, str]) -> None:
    plan = plan_saliency(saliency_settings({"run": run.uri}), run)
    chosen = [name for unit in plan.units for name in unit.payload]
    assert len(chosen) > 10
    assert distinct(chosen, images)
    row = {"measure": "iou", "method": "gradient", "concept": "dog"}
    rows = [row | {"sample_id": f"{n} {caption}", "sums": [n / 9, 1.0]} for n in range(9) for caption in "abcde"]
    keys = {str(row["sample_id"]): str(row["sample_id"])[0] for row in rows}
    (five,) = summarise_saliency(pa.Table.from_pylist(rows), 50, 0, keys).to_pylist()
    (one,) = summarise_saliency(pa.Table.from_pylist(rows[::CAPTIONS]), 50, 0, keys).to_pylist()
    assert (five["n"], one["n"]) == (9, 9)
    assert (five["low"], five["high"]) == pytest.approx((one["low"], one["high"]))


def test_an_edit_learns_on_different_images_and_keeps_none_that_shows_the_source(
    dataset: EditDataset, images: dict[str, str]
) -> None:
    new, rest = replaced(dataset, SOURCE, "dog", 4, 0), kept(dataset, [SOURCE], 40, 0)
    learnt = {example.sample_id for example in new}
    assert distinct(sorted(learnt), images)
    assert distinct([example.sample_id for example in rest], images)
    shown = {images[name] for name in dataset.ids([SOURCE])}
    assert {images[name] for name in learnt} <= shown
    assert not shown & {images[example.sample_id] for example in rest}


def test_what_any_caption_of_an_image_names_is_there(dataset: EditDataset, images: dict[str, str]) -> None:
    told = list(own_captions(dataset, 10**6, 0))
    assert distinct([one.sample.sample_id for one in told], images)
    assert len(told) == len(set(images.values()))
    by_captions = replace(dataset, caption_tokens=dataset.caption_tokens)
    by_captions.__dict__["nouns"] = replace(dataset.nouns, kind="lexicon")
    names = {image: set[str]() for image in images.values()}
    for row in dataset.run.table("occurrences").to_pylist():
        names[images[row["sample_id"]]].add(row["concept"])
    for one in own_captions(by_captions, 10**6, 0):
        assert one.present >= names[images[one.sample.sample_id]]


def test_a_part_of_the_images_is_of_as_few_shards_as_can_be(dataset: EditDataset, images: dict[str, str]) -> None:
    most = len(set(images.values())) // 3
    told = [one.sample.sample_id for one in own_captions(dataset, most, 0)]
    assert len(told) == most
    assert told == [name for name in images if name in told]
    captions = dataset.run.table("captions")
    shard_of = dict(zip(captions["sample_id"].to_pylist(), captions["shard_id"].to_pylist(), strict=True))
    read = [shard_of[name] for name in told]
    # All images of a shard but the last to be read.
    whole = {shard: {images[name] for name, one in shard_of.items() if one == shard} for shard in set(read)}
    assert sum(read.count(shard) < len(names) for shard, names in whole.items()) <= 1
    assert told != [one.sample.sample_id for one in own_captions(dataset, most, 1)]


def test_an_edit_remembers_its_images(edit: Path, images: dict[str, str]) -> None:
    (purpose,) = open_edit(edit).purposes
    assert 1 < len(purpose.images) == len(purpose.samples) <= 3
    assert set(purpose.images) == {images[name] for name in purpose.samples}
    content = json.loads((edit / "edit.json").read_text())
    del content["purposes"][0]["images"]
    (edit.parent / "older").mkdir()
    (edit.parent / "older" / "edit.json").write_text(json.dumps(content))
    (edit.parent / "older" / "edit.safetensors").write_bytes((edit / "edit.safetensors").read_bytes())
    (older,) = open_edit(edit.parent / "older").purposes
    assert older == replace(purpose, images=())


def evaluated(run: Run, edit: Path, data: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return the measures, and the captions by image."""
    settings = {
        "run": run.uri,
        "edit": str(edit),
        "data": str(data),
        "text_count": 2,
        "draws": 50,
        "bleu": False,
    }
    asked = settings | {"shard_size": 12, "pope_objects": 0, "local": True}
    done = run_job(EvaluationJob(evaluation_settings(asked)))
    captions = pa.parquet.read_table(edit / "captions.parquet").to_pylist()
    return done.headline["measures"], {row["image"]: row for row in captions}


def test_generality_is_measured_on_images_that_the_edit_never_saw(coco: CocoLike, run: Run, edit: Path) -> None:
    """On the run's own COCO file, whose samples have other ids where they are measured."""
    learnt = set(open_edit(edit).purposes[0].images)
    own, captions = evaluated(run, edit, coco.train)
    assert {image for image, row in captions.items() if row["role"] == "edited"} == learnt
    # Each image once: not again among those of the run that the edit was made on.
    assert len(captions) == coco.images
    assert own["reliability"]["n"] == len(learnt)
    sources = {image for image, row in captions.items() if row["role"] == "source"}
    assert own["image_generality"]["n"] == len(sources) > 0
    assert not sources & learnt
    rows = pa.parquet.read_table(edit / "captions.parquet")
    assert len(rows) == coco.images


def test_rows_of_the_same_image_change_nothing(coco: CocoLike, run: Run, edit: Path) -> None:
    """On held-out images, with the samples that the edit was made on next to them: each image weighs the same."""
    learnt = set(open_edit(edit).purposes[0].images)
    once, captions = evaluated(run, edit, coco.held_out)
    assert {image for image, row in captions.items() if row["role"] == "edited"} == learnt
    assert not {image_digest(sample.image) for sample in samples_of(coco.held_out)} & learnt
    exploded, again = evaluated(run, edit, coco.exploded_held_out)
    assert {image: row["role"] for image, row in again.items()} == {i: row["role"] for i, row in captions.items()}
    for name, row in exploded.items():
        assert row["n"] == once[name]["n"], name
        # Tokens of a caption vary less than independent outcomes do: there n is their number, which copies raise.
        for side in ("after",) if name.endswith("_token") else ("after", "low", "high"):
            # Rows of an image draw paraphrases of their own, so that images that change in part differ a little.
            assert row[side] == pytest.approx(once[name][side], abs=max(0.02, 1 / max(row["n"], 1))), (name, side)
    shown = [row["id"] for row in gather(run, [str(edit)]).index["editing"][0]["captions"]]
    assert len(shown) == len({name.partition("-")[0] for name in shown}) > 5


def test_digests_decide_before_ids() -> None:
    """Ids do where the edit has no digests, or the sample no image."""
    lexicon = ObjectLexicon((SOURCE, "dog"), {})
    picture = Sample("a", "there", b"pixels", "A hammer.", objects=(SOURCE,))
    same, text = replace(picture, sample_id="another"), replace(picture, image=None)
    other = replace(picture, image=b"other pixels")

    def roles(purpose: Purpose) -> list[bool]:
        requests = requests_of([purpose], lexicon)
        return [scope_of(requests, lexicon, one, "a hammer").role == EDITED for one in (picture, same, other, text)]

    purpose = Purpose("swap", SOURCE, "dog", samples=("a",))
    assert roles(purpose) == [True, False, True, True]
    assert roles(replace(purpose, images=(picture.image_key,))) == [True, True, False, True]


def test_intervals_of_claims_are_over_images(coco: CocoLike, run: Run) -> None:
    """The model says the same of each row of an image: five times the claims, and the intervals of one."""
    found = []
    for data in (coco.held_out, coco.exploded_held_out):
        asked = {"run": run.uri, "data": str(data), "local": True, "questions": 0, "draws": 50}
        done = run_job(HallucinationJob(hallucination_settings(asked)))
        found.append({(row["measure"], row["judge"], row["bin"]): row for row in done.headline["measures"]})
        claims = open_run(run.uri).table("claims")
        assert set(claims["image"].to_pylist()) == {image_digest(sample.image) for sample in samples_of(data)}
        mistakes = open_run(run.uri).table("mistakes").select(["sample_id", "word"]).to_pylist()
        shown = Counter((row["sample_id"].partition("-")[0], row["word"]) for row in mistakes)
        assert set(shown.values()) <= {1}
    one, five = found
    assert one.keys() == five.keys()
    for key, row in one.items():
        assert five[key]["n"] == CAPTIONS * row["n"]
        assert [five[key][side] for side in ("value", "low", "high")] == pytest.approx(
            [row[side] for side in ("value", "low", "high")], abs=1e-6
        ), key


def test_selectivity_holds_whole_images_out(coco: CocoLike, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    census_here(tiny("llava"), str(coco.exploded), out, shard_size=60)
    run = open_run(out)
    images = image_keys(run.table("captions"))
    settings = selectivity_settings(
        {"run": str(out), "by": "domain", "held_out": 0.4, "seed": 1, "interventions": True}
        | {"permutations": 1, "bootstraps": 1, "batch_size": 30, "local": True}
    )
    plan = plan_labels(settings, run, hold_out=True)
    held = {images[name] for name in plan.held_out}
    assert 0 < len(held) < coco.images
    assert not held & {images[name] for name in plan.replicates.samples}
    outcome = run_selectivity(settings)
    assert not outcome.quarantined
    assert len(outcome.tables["interventions"])
