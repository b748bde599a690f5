"""Neurons of hallucination as the command finds them: three passes, resumed, into tables of the run."""

import json

import pyarrow.parquet as pq
import pytest

from mmray.errors import InputError
from mmray.features.hallucination import probe
from mmray.features.hallucination.neuron_driver import run_neurons
from mmray.features.hallucination.neuron_tables import TABLES
from mmray.features.hallucination.settings import neuron_settings
from mmray.neuron_names import PLAIN
from mmray.runs.run import open_run
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

SCENES = 24

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of scenes of which the data lacks the first object: naming it counts as hallucinated."""
    folder = tmp_path_factory.mktemp("neurons")
    *rows, last = scenes(SCENES + 1)
    dropped = [row["objects"][0] for row in rows]
    for row in rows:
        row["objects"] = [*row["objects"][1:], "submarine"]
    # One image has all that was dropped: an object that no image has is none that is looked for.
    last["objects"], last["boxes"] = dropped, [last["boxes"][0]] * len(dropped)
    rows.append(last)
    data = write(folder / "data.parquet", rows)
    assert census_here("demo", data, folder / "run", limit=4).complete
    return str(folder / "run"), data


@pytest.fixture(autouse=True)
def few_shuffles(monkeypatch):
    monkeypatch.setattr(probe, "SHUFFLES", 2)


def asked(run, **more):
    name, data = run
    sizes = {"shard_size": 13, "draws": 20, "candidates": 64, "tested": 3, "doses": [0.0, 4.0]}
    sizes |= {"decoding": ["vcd:0", "vcd", "no-image:5"], "ban_below": ["1e-9", "1", "1e-9:average"]}
    return neuron_settings({"run": name, "data": data, "local": True, "longest": 16, **sizes, **more})


@pytest.fixture(scope="module")
def made(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "SHUFFLES", 2)
        return run_neurons(asked(run, interventions=True))


def test_tables_say_which_neurons_and_what_they_are_worth(run, made):
    opened = open_run(run[0])
    tables = {name: opened.table(name) for name in TABLES}
    for name, table in tables.items():
        assert table.schema.names == TABLES[name].names
        assert len(table), name
    neurons = tables["hallucination_neurons"].to_pylist()
    assert 0 < len(neurons) <= 0.005 * sum(opened.info["model"]["widths"])
    assert all(PLAIN.parse(row["neuron"]) == (row["layer"], row["unit"]) and row["weight"] for row in neurons)
    mentions = tables["hallucination_mentions"].to_pylist()
    assert made.headline["rows"] == len(mentions)
    assert {row["fold"] for row in mentions} == {"fit", "test"}
    # Images are in one fold, and the class is the data's.
    assert len({(row["image"], row["fold"]) for row in mentions}) == len({row["image"] for row in mentions})
    objects = {row["sample_id"]: row["objects"] for row in pq.read_table(run[1]).to_pylist()}
    assert all(row["hallucinated"] == (row["word"] not in objects[row["sample_id"]]) for row in mentions)
    judges = {row["judge"] for row in tables["hallucination_probe"].to_pylist()}
    assert {"neurons", "detector", "random neurons", "shuffled classes"} <= judges


def test_interventions_are_measured_next_to_random_neurons(run, made):
    rows = open_run(run[0]).table("hallucination_doses").to_pylist()
    measures = {row["measure"] for row in rows if row["neurons"] == "none" and row["change"] is None}
    assert measures == {"chair_i", "chair_s", "recall", "length", "pope_accuracy", "pope_yes", "pope_f1", "perplexity"}
    counts = {(row["neurons"], row["change"]): row["count"] for row in rows}
    for kind in ("raised", "lowered"):
        if (kind, "scale") in counts:
            assert counts[kind, "scale"] == counts[f"random like {kind}", "scale"]
    assert counts["probe", "true mean"] == made.headline["neurons"]
    unchanged = {row["measure"]: row["value"] for row in rows if row["neurons"] == "none" and row["change"] is None}
    found = {(row["neurons"], row["change"], row["dose"], row["measure"]): row["value"] for row in rows}
    for (*intervention, measure), value in found.items():
        if measure == "perplexity relative":
            own = found[*intervention, "perplexity"]
            assert value == pytest.approx(own / unchanged["perplexity"])
            assert own != unchanged["perplexity"] or intervention[0] == "none"


def test_decodings_are_in_the_same_table(run, made):
    rows = open_run(run[0]).table("hallucination_doses").to_pylist()
    rivals = {(row["change"], row["dose"]) for row in rows if row["neurons"] == "none" and row["change"]}
    assert rivals == {
        *[("vcd", 0.0), ("vcd", 1.0), ("no-image", 5.0), ("ban below", 1e-9), ("ban below", 1.0)],
        ("average:0.75, ban below", 1e-9),
    }
    found = {(row["neurons"], row["change"], row["dose"], row["measure"]): row["value"] for row in rows}
    for measure in ("chair_i", "recall", "length", "pope_yes"):
        # Without strength, nothing changes.
        assert found["none", "vcd", 0.0, measure] == found["none", None, None, measure]
        assert ("none", "vcd", 1.0, measure) in found
    for measure in ("chair_i", "recall", "length"):
        assert found["none", "ban below", 1e-9, measure] == found["none", None, None, measure]
    # Below a probability of 1 is every mention, and each word is banned in turn.
    assert found["none", "ban below", 1.0, "recall"] < found["none", None, None, "recall"]
    # Plain text has no image, and so no decoding.
    assert ("none", "vcd", 1.0, "perplexity") not in found


def test_an_unknown_decoding_is_refused_before_any_pass(run):
    with pytest.raises(InputError, match="choose from vcd"):
        run_neurons(asked(run, decoding=["vdc"]))
    with pytest.raises(InputError, match="choose from vcd"):
        run_neurons(asked(run, ban_below=["0.3:vdc"]))
    for wrong in ("0", "1.5", "x"):
        with pytest.raises(InputError, match="give a probability"):
            run_neurons(asked(run, ban_below=[wrong]))


def test_a_stopped_call_goes_on_and_a_second_one_repeats_nothing(run, made):
    tables = {name: open_run(run[0]).table(name) for name in TABLES}
    seen = []
    again = run_neurons(asked(run, interventions=True), seen.append)
    assert not seen
    # The first pass writes no table, by which it could be known to be done.
    assert all(one.already_done for one in again.passes[1:])
    # Another number of candidates needs no caption again.
    run_neurons(asked(run, candidates=32), seen.append)
    assert [progress.done for progress in seen if progress.phase == "working"] == [13, 25]
    run_neurons(asked(run, interventions=True))
    for name, table in tables.items():
        assert open_run(run[0]).table(name).equals(table), name


def test_the_command_prints_judges_and_doses(run, made, mmray):
    name, data = run
    sizes = ["--shard-size", 13, "--draws", 20, "--candidates", 64, "--longest", 16]
    call = ["hallucination", name, "--data", data, "--local", *sizes]
    doses = ["--tested", 3, "--doses", 0, "--doses", 4, "--decoding", "vcd"]
    done = mmray(*call, "--neurons", "--interventions", *doses)
    assert done.status == 0, done.err
    assert "random like" in done.out and "shuffled classes" in done.out and "vcd 1" in done.out
    found = json.loads(mmray(*call, "--neurons", "--json").out)
    assert found["neurons"] == made.headline["neurons"]
    assert "give both" in mmray(*call, "--interventions").refusal
    assert "--pictures" in mmray(*call, "--neurons", "--pictures", "p").refusal


def test_too_few_hallucinations_are_said(run, tmp_path):
    data = write(tmp_path / "clean.parquet", scenes(4))
    with pytest.raises(InputError, match="give more images"):
        run_neurons(asked((run[0], data)))
