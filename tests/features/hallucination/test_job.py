"""Second opinions and moved embeddings as the commands run them: tables, resumed, on Ray or not; an edit's nouns."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from mmray.data.shards import read_shard
from mmray.engine import run as run_job
from mmray.errors import InputError
from mmray.features.hallucination import inputs, perturb_job
from mmray.features.hallucination.bias_job import BiasJob
from mmray.features.hallucination.inputs import ModelOptions
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.perturb_job import PerturbJob
from mmray.features.hallucination.settings import bias_settings, hallucination_settings, perturbation_settings
from mmray.features.hallucination.tables import TABLES
from mmray.runs.run import open_run
from mmray.runs.tables import read_table
from mmray.storage import open_store
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

OWN = {
    "source": "cat",
    "target": "dog",
    "unrelated": ["ship", "star"],
    "question": ["How many objects are in the image? Answer with a number."],
    "parse": "number",
}
MADE = ("claims", "opinions", "mistakes")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("opinions") / "data.parquet", scenes(6))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("opinions") / "run"
    assert census_here("demo", data, out).complete
    return str(out)


def test_all_that_rows_depend_on_is_in_their_folders_name(run):
    job = HallucinationJob(asked(run))
    context = job.plan().context
    statistics, columns = context.statistics, context.columns
    others = [
        replace(
            context,
            statistics=replace(statistics, translations={**statistics.translations, "dog": {"es": "perro"}}),
        ),
        replace(context, columns=columns.model_copy(update={"objects": "tags"})),
        *(
            replace(context, options=ModelOptions(**given))
            for given in ({"dtype": "bf16"}, {"prompt": "Say."}, {"prefix": "A"})
        ),
    ]
    names = [job.settings.fingerprint(job.digests(some)) for some in (context, *others)]
    assert len(set(names)) == len(names)
    trusting = replace(context, options=replace(context.options, trust_remote_code=True))
    assert job.settings.fingerprint(job.digests(trusting)) == names[0]


def test_the_model_is_loaded_as_its_census_had_it(run, monkeypatch):
    loaded = []
    monkeypatch.setattr(inputs, "join", lambda model, *_: loaded.append(model) or SimpleNamespace())
    job = HallucinationJob(asked(run))
    context = replace(job.plan().context, options=ModelOptions(dtype="bf16"))
    job.worker(context)
    assert loaded[0].network.dtype == torch.bfloat16


def asked(run, **more):
    return hallucination_settings({"run": run, "local": True, "shard_size": 2, "draws": 20, "limit": 4} | more)


def moved(data, out, **more):
    settings = {"model": "demo", "data": data, "out": str(out), "shard_size": 1, "draws": 20, "limit": 2, "steps": 2}
    return perturbation_settings(settings | {"local": True, "randoms": 1} | more)


def test_claims_are_tables_of_the_run_and_a_stopped_one_goes_on(run):
    seen = []

    def stop(progress):
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(HallucinationJob(asked(run)), follow=stop)
    done = run_job(HallucinationJob(asked(run)), follow=seen.append)
    assert done.complete
    assert [progress.done for progress in seen[2:]] == [2, 4, 4]
    again = run_job(HallucinationJob(asked(run)))
    opened = open_run(run)
    for name in MADE:
        assert opened.table(name).schema.names == TABLES[name].names
    claims = opened.table("claims")
    assert len(claims) == done.headline["rows"] == again.headline["rows"]
    assert again.headline["measures"] == done.headline["measures"]
    wrong = pc.and_(claims["claimed"], pc.invert(claims["present"]))
    assert len(opened.table("mistakes")) == pc.sum(wrong.cast("int64")).as_py()
    assert {row["judge"] for row in done.headline["measures"]} == {None, "detector", "language model"}


@pytest.mark.slow
def test_a_synonym_is_a_claim_of_its_object(run, tmp_path):
    listed = tmp_path / "synonyms.json"
    captions = {}
    run_job(HallucinationJob(asked(run, questions=0)))
    named = open_run(run).table("claims").to_pylist()
    word = named[0]["word"]
    # The data calls it otherwise: what the captions say is then a synonym at most.
    data = tmp_path / "data.parquet"
    pq.write_table(renamed(open_run(run).info["settings"]["data"], word, "thing"), data)
    for listing in ({}, {"thing": [word]}):
        listed.write_text(json.dumps(listing))
        run_job(HallucinationJob(asked(run, questions=0, data=str(data), synonyms=str(listed))))
        captions[bool(listing)] = [row["word"] for row in open_run(run).table("claims").to_pylist()]
    assert captions[True].count("thing") == [row["word"] for row in named].count(word)
    assert captions[False] == [name for name in captions[True] if name != "thing"]
    with pytest.raises(InputError, match="no such file"):
        run_job(HallucinationJob(asked(run, synonyms=str(tmp_path / "none.json"))))


def renamed(data: str, name: str, other: str) -> pa.Table:
    table = pq.read_table(data)
    rows = [[other if own == name else own for own in objects] for objects in table["objects"].to_pylist()]
    return table.set_column(
        table.schema.get_field_index("objects"), "objects", pa.array(rows, table.schema.field("objects").type)
    )


def test_answers_of_moves_are_tables_of_their_folder(data, tmp_path):
    done = run_job(PerturbJob(moved(data, tmp_path / "moved")))
    assert done.complete
    store = open_store(tmp_path / "moved")
    assert len(read_table(store, "answers")) == done.headline["rows"] == 2 * 8 * 3
    assert {row["condition"] for row in read_table(store, "changes").to_pylist()} >= {"steps", "random in place"}
    with pytest.raises(InputError, match=r"holds a run with other settings \(norm was 0\.85, now 0\.1"):
        run_job(PerturbJob(moved(data, tmp_path / "moved", norm=0.1)))


@pytest.mark.slow
def test_how_embeddings_vary_is_told_by_the_first_images_alone(data, tmp_path):
    """However large the data is."""
    counting = patch.object(perturb_job, "read_shard", side_effect=read_shard)
    with patch.object(perturb_job, "REFERENCE", 2), counting as read:
        assert run_job(PerturbJob(moved(data, tmp_path / "moved", limit=5, **OWN))).complete
    assert [call.args[1].shard_id for call in read.call_args_list] == [0, 1]


def test_a_question_of_ones_own_is_asked_once_a_move(data, tmp_path):
    done = run_job(PerturbJob(moved(data, tmp_path / "own", **OWN)))
    assert done.headline["rows"] == 2 * 8
    assert {row["about"] for row in done.headline["measures"]} == {"question"}


def test_released_questions_are_asked_of_the_images_that_they_name(run, tmp_path):
    ids = sorted({row["sample_id"] for row in open_run(run).table("captions").to_pylist()})[:2]
    file = tmp_path / "coco_pope_popular.json"
    lines = [
        {"question_id": 1, "image": f"{ids[0]}.jpg", "text": "Is there a zebra in the image?", "label": "no"},
        {"question_id": 2, "image": f"{ids[0]}.jpg", "text": "Is there an sun in the image?", "label": "yes"},
        {"question_id": 3, "image": f"{ids[1]}.jpg", "text": "Is there a ship in the image?", "label": "no"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    settings = {"limit": None, "pope": [str(file)]}
    done = run_job(HallucinationJob(asked(run, **settings)))
    rows = open_run(run).table("claims").to_pylist()
    assert {row["sample_id"] for row in rows} == set(ids)
    answers = {(row["sample_id"], row["word"], row["kind"], row["present"]) for row in rows if row["kind"] != "caption"}
    assert answers == {
        (ids[0], "zebra", "popular", False),
        (ids[0], "sun", "present", True),
        (ids[1], "ship", "popular", False),
    }
    means = {
        (row["claims"], row["measure"]): row["n"] for row in done.headline["measures"] if row["judge"] == "detector"
    }
    assert sum(means.get((said, f"mean_{side}"), 0) for said in ("yes", "no") for side in ("present", "absent")) == 3
    file.write_text(json.dumps(lines[0] | {"image": "elsewhere.jpg"}))
    with pytest.raises(InputError, match="names no image of the data"):
        run_job(HallucinationJob(asked(run, **settings)))


def test_bias_is_a_table_of_the_run_for_each_pair_and_its_controls(run):
    word = open_run(run).table("occurrences")["concept"][0].as_py()
    given = {"pair": [f"{word}:zebra", "zebra:ship"], "unrelated": ["sun", "star"], "limit": 3, "steps": 2, "draws": 20}
    asked = {"run": run, "local": True, "question": [f"Is there a {word} in the image?"], "shard_size": 2} | given
    done = run_job(BiasJob(bias_settings(asked | {"parse": "yes_no"})))
    assert done.complete
    rows = open_run(run).table("bias").to_pylist()
    # A pair is for images that have its source.
    assert {(row["source"], row["target"]) for row in rows} <= {(word, "zebra"), ("zebra", "ship")}
    own = {row["condition"]: row for row in rows if row["source"] == word}
    assert own.keys() >= {"steps", "unrelated", "random", "sign step", "sign step unrelated", "sign step random"}
    answers = open_run(run).table("bias_answers").to_pylist()
    assert all(row["asked"] == sum(a["condition"].rstrip(" 1") == c for a in answers) for c, row in own.items())
    # A yes is no number: every reply is counted as not read.
    run_job(BiasJob(bias_settings(asked)))
    rows = open_run(run).table("bias").to_pylist()
    assert all(row["n"] == 0 and row["value"] is None and row["unread_after"] == row["asked"] for row in rows)
    with pytest.raises(InputError, match="give SOURCE:TARGET"):
        bias_settings(asked | {"pair": ["woman"]})
    with pytest.raises(InputError, match="no image has unicorn among its objects"):
        run_job(BiasJob(bias_settings(asked | {"pair": ["unicorn:dog"]})))


def test_data_without_objects_is_refused(run, tmp_path):
    bare = tmp_path / "bare.parquet"
    pq.write_table(pq.read_table(write(tmp_path / "some.parquet", scenes(2))).drop_columns(["objects"]), bare)
    with pytest.raises(InputError, match="without which no claim can be judged"):
        run_job(HallucinationJob(asked(run, data=str(bare))))
    with pytest.raises(InputError, match="give --source, --target and --unrelated"):
        run_job(PerturbJob(moved(str(bare), tmp_path / "out")))


@pytest.mark.slow
def test_images_that_are_too_many_pixels_together_are_looked_at_in_parts(run, monkeypatch):
    whole = run_job(HallucinationJob(asked(run, seed=2)))
    claims = open_run(run).table("claims").sort_by("sample_id")
    sizes = []
    decoded = inputs._decoded
    monkeypatch.setattr(inputs, "_decoded", lambda samples: sizes.append(len(samples)) or decoded(samples))
    monkeypatch.setattr(inputs, "BUDGET", 1)
    for entry in open_run(run).folder.store.list("hallucination/"):
        open_run(run).folder.store.delete(entry.key)
    parted = run_job(HallucinationJob(asked(run, seed=2)))
    assert sizes == [1] * 4
    assert parted.headline["rows"] == whole.headline["rows"]
    found = open_run(run).table("claims").sort_by("sample_id")
    assert sorted(found["word"].to_pylist()) == sorted(claims["word"].to_pylist())
