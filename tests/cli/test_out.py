"""OUT: never by accident the current folder, the data's, or another edit's; a refused census leaves it free."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from mmray.engine import LocalExecutor
from mmray.engine import run as run_job
from mmray.engine.session import actor_pool
from mmray.engine.units import UnitOutcome, UnitRunner, WorkOrder
from mmray.errors import InputError
from mmray.features.census.job import CensusJob
from mmray.features.census.settings import census_settings
from mmray.features.editing import closed_form
from mmray.features.editing.edit import Purpose, WeightEdit, check_free, open_edit
from mmray.features.editing.edit_methods import EDIT_METHODS
from mmray.features.editing.settings import edit_settings
from mmray.runs.lease import hold_lease
from mmray.runs.run import Run, open_run
from mmray.storage import open_store
from tests.support.command import Answer
from tests.support.data_files import write_jsonl
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write

Mmray = Callable[..., Answer]


@pytest.mark.parametrize("out", ["", "  "])
def test_an_empty_out_is_refused(
    mmray: Mmray, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = "give a folder, or s3://bucket/prefix"
    settings = ["--model", run.info["settings"]["model"], "--data", run.info["settings"]["data"]]
    assert said in mmray("census", "--local", *settings, "--out", out).refusal
    concept = next(iter(run.concepts))
    assert said in mmray("edit", run.uri, "--suppress", concept, "--out", out).refusal
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "out", "said"),
    [
        ("folder", "folder", "lies in the data's folder"),
        ("folder", "folder/runs/one", "lies in the data's folder"),
        ("folder", ".", "choose a folder of the run's own"),
        ("folder/0.parquet", "folder", "choose a folder of the run's own"),
        ("folder/*.parquet", "folder", "choose a folder of the run's own"),
        ("folder/0.parquet", "folder/run", None),
        ("folder", "folder-run", None),
    ],
)
def test_data_and_run_lie_apart(
    mmray: Mmray,
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: str,
    out: str,
    said: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder" / "0.parquet", scenes(2))
    answer = mmray("census", "--local", "--model", tiny("llava"), "--data", data, "--out", out)
    if said is None:
        assert answer.status == 0
    else:
        assert answer.refusal.startswith(f"--out {out}: ")
        assert said in answer.refusal
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["0.parquet"]


def test_a_run_is_not_put_among_images(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "images", scenes(2))
    with pytest.raises(InputError, match="lies in the data's folder"):
        census_here(tiny("llava"), str(tmp_path / "images"), tmp_path / "images" / "run")


def test_a_refused_census_leaves_out_to_the_corrected_one(
    mmray: Mmray, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny("llava"), broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: 1 << 12])
    data = write(tmp_path / "data.parquet", scenes(4))
    out = tmp_path / "run"
    refusal = mmray("census", "--local", "--model", broken, "--data", data, "--out", out).refusal
    assert "broken" in refusal
    answer = mmray("census", "--local", "--model", tiny("llava"), "--data", data, "--out", out)
    assert answer.status == 0, answer.err
    census_here(tiny("llava"), data, tmp_path / "undisturbed")
    run, undisturbed = open_run(out), open_run(tmp_path / "undisturbed")
    assert run.info["fingerprint"] == undisturbed.info["fingerprint"]
    assert run.table("rankings").equals(undisturbed.table("rankings"))


def test_more_gpus_than_there_are_leave_no_run_in_the_way(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.parquet", scenes(2)), tmp_path / "run"

    class Refusing(LocalExecutor):
        def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
            actor_pool(None, 4.0, [(2.0, 0.0)], len(groups))
            yield from super().run(order, groups)

    asked = census_settings({"model": str(tiny("llava")), "data": data, "out": str(out)})
    with pytest.raises(InputError, match="--gpus-per-worker 4"):
        run_job(CensusJob(asked), executor=Refusing())
    assert census_here(tiny("llava"), data, out, top_k=3).complete
    assert open_run(out).info["settings"]["top_k"] == 3


def test_a_run_with_a_result_stays(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.parquet", scenes(4)), tmp_path / "run"
    census_here(tiny("llava"), data, out, shard_size=2)
    store = open_store(out)
    # Whether it ended or not: one receipt, or one shard that was given up, is a result.
    store.delete("receipts/000001.json")
    with pytest.raises(InputError, match=r"holds a run with other settings \(shard_size was 2, now 3\)"):
        census_here(tiny("llava"), data, out, shard_size=3)
    store.delete("receipts/000000.json")
    store.put("aside/000000.json", b'{"shard_id": 0, "samples": 2, "reason": "given up"}')
    with pytest.raises(InputError, match="holds a run with other settings"):
        census_here(tiny("llava"), data, out, shard_size=3)


def test_a_run_that_is_driven_stays_without_a_result(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    data, out = write(tmp_path / "data.parquet", scenes(4)), tmp_path / "run"
    census_here(tiny("llava"), data, out, shard_size=2)
    store = open_store(out)
    for entry in store.list("receipts/"):
        store.delete(entry.key)
    before = store.read("run.json")
    with hold_lease(store), pytest.raises(InputError, match="another driver is at work on this run"):
        census_here(tiny("llava"), data, out, shard_size=3)
    assert store.read("run.json") == before


def test_a_worker_of_the_replaced_run_commits_nothing(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A worker outlives its driver for a while: what it computed is of other settings than the run that came after."""
    data, out = write(tmp_path / "data.parquet", scenes(4)), tmp_path / "run"
    left: list[UnitRunner] = []

    class Stopped(LocalExecutor):
        """Its worker has loaded the model when the driver ends."""

        def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
            left.append(UnitRunner(order))
            raise KeyboardInterrupt

    asked = census_settings({"model": str(tiny("llava")), "data": data, "out": str(out), "shard_size": 2})
    with pytest.raises(KeyboardInterrupt):
        run_job(CensusJob(asked), executor=Stopped())
    census_here(tiny("llava"), data, out, shard_size=4)
    assert "another run has since begun here" in left[0].run(1).problem
    # and one that comes as late as that does not even load it.
    assert "another run has since begun here" in UnitRunner(left[0].order).run(1).problem
    assert list(open_run(out).folder.receipts()) == [0]


def edit_for(model: str, **settings: object) -> WeightEdit:
    wishes = [edit_settings(settings).model_dump()]
    purpose = Purpose("suppress", str(settings["suppress"]), "object")
    one = torch.ones(1, dtype=torch.long)
    return WeightEdit(one, one, torch.ones(1, 4), (purpose,), model, {"wishes": wishes})


def test_an_edit_is_not_written_over_another(mmray: Mmray, run: Run, tmp_path: Path) -> None:
    first, second, *_ = run.concepts
    folder = tmp_path / "edit"
    edit_for("m", suppress=first).save(folder)
    before = (folder / "edit.json").read_bytes()
    refusal = mmray("edit", run.uri, "--suppress", second, "--out", folder).refusal
    assert refusal == f"{folder}: holds an edit with other settings ({first} → object); give this one another folder"
    assert "other settings" in mmray("edit", run.uri, "--suppress", first, "--seed", 1, "--out", folder).refusal
    assert (folder / "edit.json").read_bytes() == before
    # The same one is made again.
    check_free(str(folder), [edit_settings({"suppress": first})])
    assert open_edit(folder).purpose.source == first
    # Not if it was made on another run; and one whose rows are damaged may be made again.
    check_free(str(folder), [edit_settings({"suppress": first})], "runs/this")
    facts = json.loads(before)
    facts["settings"]["run"] = "runs/other"
    (folder / "edit.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="holds an edit of another run, runs/other"):
        check_free(str(folder), [edit_settings({"suppress": first})], "runs/this")
    (folder / "edit.safetensors").write_bytes(b"damaged")
    check_free(str(folder), [edit_settings({"suppress": first})])
    (folder / "edit.json").write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        check_free(str(folder), [edit_settings({"suppress": first})])


@pytest.mark.parametrize("method", [name for name, method in EDIT_METHODS.items() if method.closed_form])
def test_a_target_is_refused_by_methods_that_only_take_away(
    mmray: Mmray, run: Run, tmp_path: Path, method: str
) -> None:
    first, second, *_ = run.concepts
    asked = ["edit", run.uri, "--source", first, "--target", second, "--method", method, "--out", tmp_path / "edit"]
    assert f"--method {method} can't write --target; give --suppress {first}" in mmray(*asked).refusal
    assert not (tmp_path / "edit").exists()
    assert edit_settings({"suppress": first, "method": method}).concept == first


def test_closed_forms_are_the_methods_that_can_t_write_a_target() -> None:
    for method in EDIT_METHODS.values():
        function = resolve_name(method.function)
        assert method.closed_form == (function.__module__ == closed_form.__name__)
