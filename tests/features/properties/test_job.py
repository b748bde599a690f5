"""Properties as the command runs them: committed once, resumed, on Ray or not, the same every time; refusals."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmray.demo import DATA
from mmray.errors import InputError
from mmray.features.census import shard
from mmray.features.properties.protocols import PROTOCOLS
from mmray.features.properties.tables import TABLES
from mmray.runs.run import open_run
from tests.support.command import Answer
from tests.support.local_jobs import census_here, properties_here
from tests.support.samples import samples_of

MADE = ("properties", "heatmaps")
ASKED = {"concepts": 2, "min_occurrences": 2, "images": 3, "maps": 2, "longest": 8, "draws": 50}


@pytest.fixture(scope="module")
def run(own_census: Callable[..., Path]) -> Path:
    return own_census(48, shard_size=24)


def tables(run: Path) -> dict[str, pa.Table]:
    opened = open_run(run)
    return {name: opened.table(name) for name in MADE}


def without(run: Path) -> None:
    store = open_run(run).folder.store
    for prefix in ("properties/", "snapshots/", "tables/properties", "tables/heatmaps"):
        for entry in store.list(prefix):
            store.delete(entry.key)


def test_before_them_the_tables_are_refused_with_what_makes_them(run):
    without(run)
    with pytest.raises(InputError, match="no table 'properties' yet; make it: mmray properties RUN"):
        open_run(run).properties()


def test_tables_have_their_columns_and_every_measure_its_protocol(run):
    done = properties_here(run, **ASKED)
    assert done.complete, open_run(run).folder.store.list("properties/")
    assert done.headline["heatmaps"] == len(open_run(run).table("heatmaps"))
    found = tables(run)
    for name, table in found.items():
        assert table.schema.names == TABLES[name].names
        assert len(table)
    rows = found["properties"].to_pylist()
    # Of the demo's few concepts here, none may be named with permuted patches.
    optional = {"bertscore", "moverscore", "clipscore", "overlap_regenerated"}
    assert {row["measure"] for row in rows} | optional == set(PROTOCOLS)
    assert all(row["protocol"].endswith(PROTOCOLS[row["measure"]]) for row in rows)
    for row in rows:
        assert row["n"] > 0
        assert row["low"] is None or row["low"] - 1e-9 <= row["value"] <= row["high"] + 1e-9, row
    summary = open_run(run).properties()
    assert pc.all(pc.is_null(summary["concept"])).as_py()
    controls = {(row["measure"], row["method"]) for row in summary.to_pylist()}
    assert {("zeroed_own", name) for name in ("score", "layer-matched", "activation-matched", "uniform")} <= controls


def test_a_second_call_measures_nothing_again(run):
    properties_here(run, **ASKED)
    before = tables(run)
    calls = []
    properties_here(run, **ASKED, follow=calls.append)
    assert calls == []
    assert tables(run) == before


def test_a_stopped_one_goes_on_and_gives_the_same(run):
    properties_here(run, **ASKED)
    before = tables(run)
    without(run)
    seen = []

    def stop(progress) -> None:
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        properties_here(run, **ASKED, follow=stop)
    assert properties_here(run, **ASKED).complete
    assert tables(run) == before


def test_maps_alone_leave_the_properties_as_they_are(run):
    properties_here(run, **ASKED)
    before = tables(run)
    properties_here(run, **ASKED | {"only": "maps", "maps": 1})
    after = tables(run)
    assert after["properties"] == before["properties"]
    assert len(after["heatmaps"]) < len(before["heatmaps"])


def test_a_concept_that_fails_is_told_and_the_others_go_on(run, monkeypatch):
    from mmray.features.properties import probe

    whole = probe.sensitivity

    def failing(subject, found) -> None:
        if failing.first:
            failing.first = False
            raise RuntimeError("out of memory")
        whole(subject, found)

    failing.first = True
    monkeypatch.setattr(probe, "sensitivity", failing)
    done = properties_here(run, **ASKED | {"seed": 1})
    assert (done.failures, done.complete) == (1, False)
    causal = open_run(run).sql("select distinct concept from properties where property = 'causal'")
    assert causal["concept"].null_count == 1
    assert len(causal) == 2  # the other concept, and all that were measured


def test_an_image_beyond_the_budget_of_pixels_is_a_row_of_errors(run, monkeypatch):
    known = {sample.sample_id: sample for sample in samples_of(DATA, 48)}
    ((width, height),) = {Image.open(BytesIO(sample.image)).size for sample in known.values()}
    # Both concepts have two images, and three of others.
    monkeypatch.setattr(shard, "BUDGET", 4 * width * height)
    done = properties_here(run, **ASKED | {"images": 6, "only": "properties"})
    errors = pa.concat_tables(done.parts.each("errors")).to_pylist()
    left_out = [row for row in errors if row["sample_id"] is not None]
    assert len({row["source"] for row in left_out}) == len(left_out) == done.failures == ASKED["concepts"]
    for row in left_out:
        source = known[row["sample_id"]].source
        assert row["message"] == f"{source}: left out: the concept's images have more than 100,000,000 pixels together"
        assert row["stage"] == "encode"
    assert not done.complete


def test_images_of_another_run_are_held_out(run, tmp_path):
    concept, rows = next(iter(open_run(run).concepts)), pq.read_table(DATA).to_pylist()
    # Scenes of the run, scenes of its most frequent concept, and a few of others.
    fresh = [row for row in rows[48:] if row["language"] == rows[0]["language"]]
    shown = [[row for row in fresh if (concept in row["caption"]) == names][:4] for names in (True, False)]
    chosen = pa.Table.from_pylist([*rows[:48:6], *shown[0], *shown[1]], schema=pq.read_schema(DATA))
    pq.write_table(chosen, tmp_path / "other.parquet")
    assert census_here("demo", str(tmp_path / "other.parquet"), tmp_path / "other").complete
    properties_here(run, **ASKED)
    maps = open_run(run).table("heatmaps")
    done = properties_here(run, **ASKED | {"held_out": str(tmp_path / "other"), "concepts": 1, "only": "properties"})
    assert done.complete
    observed = pa.concat_tables(done.parts.each("observations"))
    seen = set(observed.filter(pc.equal(observed["measure"], "zeroed_own"))["sample_id"].to_pylist())
    ranked = set(open_run(run).table("captions")["sample_id"].to_pylist())
    assert ranked & set(open_run(tmp_path / "other").table("captions")["sample_id"].to_pylist())
    assert seen
    assert not seen & ranked
    table = open_run(run).table("properties").to_pylist()
    assert {row["protocol"].partition(",")[0] for row in table if row["method"] == "score"} == {"held-out"}
    # The report draws maps over the run's own images.
    assert open_run(run).table("heatmaps") == maps


def test_a_run_of_another_model_is_refused_for_held_out_images(run, tiny, tmp_path):
    assert census_here(tiny("llava"), str(DATA), tmp_path / "other", limit=4).complete
    with pytest.raises(InputError, match=r"of another model than .*; give a run of the same one"):
        properties_here(run, **ASKED | {"held_out": str(tmp_path / "other")})


def test_a_language_without_concepts_is_refused(run):
    with pytest.raises(InputError, match="no concept with 2 images in language 'xx'; lower --min-occurrences"):
        properties_here(run, **ASKED | {"language": "xx"})


def test_wrong_settings_are_one_line(run, mmray: Callable[..., Answer]):
    assert "min_occurrences" in mmray("properties", run, "--min-occurrences", 1).refusal
    assert "no run here" in mmray("properties", run / "nowhere").refusal
