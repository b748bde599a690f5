"""Saliency measures as the command runs them: committed once, resumed, on Ray or not; one picture; refusals."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from jobs.demo.scenes import World
from mmray.demo import DATA, DETECTOR
from mmray.detector.alignment import Pair, save_alignment
from mmray.detector.heads import WEIGHTS
from mmray.detector.vision_tower import open_tower
from mmray.engine import Progress
from mmray.errors import InputError
from mmray.features.saliency.methods import METHODS, OF_BOXES
from mmray.features.saliency.observations import CHANCE
from mmray.features.saliency.summary import PROTOCOLS
from mmray.features.saliency.tables import TABLES
from mmray.models.loading import digest
from mmray.runs.run import open_run
from mmray.storage import open_store
from tests.support.command import Answer
from tests.support.local_jobs import census_here, saliency_here
from tests.support.owls import build_owl

MADE = ("saliency", "saliency_maps")
ASKED = {"images": 8, "maps": 2, "draws": 50, "methods": "detector, gradient"}


@pytest.fixture(scope="module")
def run(own_census: Callable[..., Path]) -> Path:
    return own_census(48, shard_size=24)


def tables(run: Path) -> dict[str, pa.Table]:
    opened = open_run(run)
    return {name: opened.table(name) for name in MADE}


def without(run: Path) -> None:
    store = open_run(run).folder.store
    for prefix in ("saliency/", "snapshots/", "tables/saliency"):
        for entry in store.list(prefix):
            store.delete(entry.key)


def test_tables_have_their_columns_every_method_and_measure(run):
    # One image: the model is asked at every part of its words' maps that is erased, for all methods.
    done = saliency_here(run, images=1, maps=1, draws=50, erasures=True)
    assert done.complete and done.headline["images"] == 1
    found = tables(run)
    for name, table in found.items():
        assert table.schema.names == TABLES[name].names and len(table)
    rows = found["saliency"].to_pylist()
    assert {(row["measure"], row["method"]) for row in rows} == {
        *((measure, method) for measure in PROTOCOLS for method in METHODS),
        ("pointing_game", CHANCE),
    }
    check_intervals(rows, 1, done.headline["words"])
    assert {row["method"] for row in found["saliency_maps"].to_pylist()} == set(METHODS)


def check_intervals(rows, images: int, words: int) -> None:
    for row in rows:
        assert 0 <= row["low"] <= row["value"] + 1e-9 and row["value"] <= row["high"] + 1e-9 <= 1 + 2e-9, row
        assert row["n"] == images and row["words"] == words


def test_a_stopped_one_goes_on_and_gives_the_same_and_a_second_call_does_nothing(run):
    without(run)
    done = saliency_here(run, **ASKED)
    before = tables(run)
    check_intervals(before["saliency"].to_pylist(), ASKED["images"], done.headline["words"])
    calls = []
    saliency_here(run, **ASKED, follow=calls.append)
    assert calls == []
    without(run)
    seen = []

    def stop(progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saliency_here(run, **ASKED, follow=stop)
    assert saliency_here(run, **ASKED).complete
    assert tables(run) == before


def test_another_detector_is_measured_anew_and_the_same_one_is_not(run, tmp_path):
    """It is known by what its files hold, not by their path or age."""
    without(run)
    heads, asked = tmp_path / "heads", {"images": 2, "maps": 0, "draws": 5, "methods": "detector"}

    def measured(detector: Path | None) -> bool:
        calls: list[Progress] = []
        saliency_here(run, **asked, detector=detector and str(detector), follow=calls.append)
        return bool(calls)

    assert measured(None)
    shutil.copytree(DETECTOR, heads)
    os.utime(heads / WEIGHTS, (1, 1))
    assert not measured(heads)
    heads = heads.rename(tmp_path / "elsewhere")
    assert not measured(heads)
    before = tables(run)["saliency"]
    save_file({name: -value for name, value in load_file(heads / WEIGHTS).items()}, heads / WEIGHTS)
    assert measured(heads)
    assert tables(run)["saliency"] != before


def test_what_can_t_be_is_one_line(run, mmray: Callable[..., Answer]):
    with pytest.raises(InputError, match="unknown saliency method 'guess'"):
        saliency_here(run, methods="guess")
    with pytest.raises(InputError, match="neither a folder nor a model"):
        saliency_here(run, detector="no-such-detector")
    assert "give a RUN, or --model, --image and --word" in mmray("saliency").refusal
    assert "not a RUN" in mmray("saliency", run, "--word", "dog").refusal
    with pytest.raises(InputError, match="names none of alignment"):
        saliency_here(run, methods=",")


@pytest.mark.slow
def test_a_model_without_a_detector_has_the_other_methods(tmp_path, tiny):
    assert census_here(tiny("llava"), "demo", tmp_path / "run", limit=24).complete
    done = saliency_here(tmp_path / "run", images=2, maps=1, draws=20)
    assert done.complete
    rows = open_run(tmp_path / "run").table("saliency").to_pylist()
    assert {row["method"] for row in rows} == set(METHODS) - set(OF_BOXES) | {CHANCE}
    # A control goes with the measures that the part of the image is no chance level of.
    assert {row["measure"] for row in rows if row["method"] == "random-patches"} >= {"iou", "max_box_accuracy"}
    with pytest.raises(InputError, match="--methods alignment: it weighs a detector's boxes; give --detector"):
        saliency_here(tmp_path / "run", methods="alignment")


@pytest.mark.slow
def test_one_picture_gives_a_page_or_a_picture_and_numbers(tmp_path, mmray: Callable[..., Answer]):
    world = World.load()
    scene = next(scene for scene in world.sample(20, 4) if len(scene.objects) == 2)
    image = tmp_path / "scene.png"
    Image.fromarray(world.render([scene])[0].permute(1, 2, 0).numpy()).save(image)
    word = scene.objects[0]
    given = ["saliency", "--model", "demo", "--image", image, "--word", word, "--caption", f"An image of a {word}."]
    told = json.loads(mmray(*given, "--out", tmp_path / "page.html", "--json").out)
    assert [row["method"] for row in told["maps"]] == list(METHODS)
    assert (tmp_path / "page.html").read_text().count("<figure>") == 1 + len(METHODS)
    mmray(*given, "--methods", "alignment", "--out", tmp_path / "map.png")
    assert Image.open(tmp_path / "map.png").size == (384, 384)
    assert "does not say" in mmray(*given[:-2], "--caption", "A house.").refusal
    assert "ends in .html or .png" in mmray(*given, "--out", tmp_path / "map.gif").refusal
    assert "not an image that can be read" in mmray(*given[:4], tmp_path / "none.png", *given[5:]).refusal


def test_what_an_aligned_network_shows_is_told_with_how_well_it_does(
    tmp_path, tiny, open_model, mmray: Callable[..., Answer]
):
    owl, model, image = build_owl("owlvit", tmp_path / "owl"), open_model("llava"), tmp_path / "grey.png"
    Image.new("RGB", (40, 40), "grey").save(image)
    network = Pair(open_tower(str(owl), "cpu"), model).network("projector", 1)
    measures = {"recall": {"before": 0.95, "after": 0.9}}
    facts = {"digests": {"tower": digest(owl), "model": model.digest}, "measures": measures}
    save_alignment(open_store(tmp_path / "W"), network, facts)
    asked = ["--model", tiny("llava"), "--image", image, "--word", "dog", "--caption", "A dog."]
    sight = ["--detector", owl, "--alignment", tmp_path / "W"]
    told = mmray("saliency", *asked, *sight, "--methods", "alignment", "--out", tmp_path / "map.png").out
    assert "recall of objects 0.900 (its own: 0.950)" in " ".join(told.split())


@pytest.mark.slow
def test_data_of_single_objects_is_measured_where_it_is_asked_for(tmp_path):
    rows = [row for row in pq.read_table(DATA).to_pylist() if row["language"] == "en" and len(row["objects"]) == 1][:6]
    data = tmp_path / "single.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), data)
    run = tmp_path / "run"
    assert census_here("demo", str(data), run).complete
    with pytest.raises(InputError, match="no caption names 2 different objects; see --min-objects"):
        saliency_here(run, methods="centre")
    done = saliency_here(run, methods="detector, centre", min_objects=1, maps=0, draws=20)
    assert done.headline == {"images": len(rows), "words": len(rows)}
    found = open_run(run).table("saliency").to_pylist()
    assert {row["method"] for row in found} == {"detector", "centre", CHANCE}
    assert all(row["n"] == len(rows) and "at least 1 different objects" in row["protocol"] for row in found)
