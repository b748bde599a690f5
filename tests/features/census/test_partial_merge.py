"""A run that is merged by ranges has the tables of one that the driver merges alone, whatever disturbs it."""

import os
import shutil
import subprocess
import sys
from bisect import bisect
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from mmray.engine import Parts, Progress
from mmray.errors import InputError
from mmray.features.census import partial_merge, ranges
from mmray.features.census.job import CensusJob, run_census
from mmray.features.census.partial_merge import NeuronConceptMerge, PartialMerge, RankingMerge, RowMerge, SumMerge
from mmray.features.census.refresh import refresh_run
from mmray.features.census.settings import census_settings
from mmray.runs import RunFolder, folder
from mmray.runs.run import Run, open_run
from mmray.runs.verification import verify_run
from mmray.storage import Store, open_store
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write
from tests.support.stores import Killed, Life, Mortal, dying
from tests.support.tables import same_tables

SMALL = {
    "NEURONS": 20,
    "PIECE": 200,
    "LARGE": 0,
    "RANGE": 1000,
    "ROWS_EACH": 3000,
    "CONCEPTS_EACH": 4000,
    "USES_PIECE": 300,
}
"""Constants that cut a small run into many ranges."""
KILLS = 8


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(ranges if hasattr(ranges, name) else partial_merge, name, value)


@pytest.fixture(scope="module")
def settings(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = write(tmp_path_factory.mktemp("data") / "data.parquet", scenes(40))
    # Few candidates, so that certificates have bounds to deal with.
    return {"model": str(tiny("llava")), "data": str(data), "shard_size": 5, "top_k": 3, "candidates": 12}


@pytest.fixture(scope="module")
def undivided(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("undivided") / "run"
    census_here(**settings, out=out)
    return open_run(out)


@pytest.fixture
def unmerged(small: None, settings: dict[str, Any], tmp_path: Path) -> Path:
    """A run whose shards are committed in pieces, and not merged."""
    out = tmp_path / "run"
    with patch.object(CensusJob, "partial_merges", side_effect=Killed), pytest.raises(Killed):
        census_here(**settings, out=out)
    return out


def check(out: Path, undivided: Run) -> None:
    run = open_run(out)
    same_tables(run, undivided)
    assert run.snapshot is not None and undivided.snapshot is not None
    assert run.snapshot.headline == undivided.snapshot.headline
    assert not list(out.glob("merging/**/*.*"))
    assert not verify_run(run.folder).problems


def test_ranges_change_no_table(unmerged: Path, settings: dict[str, Any], undivided: Run) -> None:
    told: list[Progress] = []
    census_here(**settings, out=unmerged, follow=told.append)
    check(unmerged, undivided)
    assert all(progress.phase == "merging" and progress.done == progress.total for progress in told)
    steps = [progress.step for progress in told]
    names = dict.fromkeys(step.partition(",")[0] for step in steps)
    first = f"{SumMerge.name} and {RowMerge.name}"
    assert list(names) == [first, RankingMerge.name, NeuronConceptMerge.name]
    units = sum(step.startswith(first) for step in steps) - 2
    assert steps[: units + 1] == [f"{first}, {number} of {units}" for number in range(units + 1)]
    assert census_here(**settings, out=unmerged).already
    job = CensusJob(census_settings(settings | {"out": str(unmerged)}))
    committed = open_run(unmerged).folder
    made = chain(*job.partial_merges(job.plan(), Parts(committed, committed.receipts(), job.parts)))
    assert [type(one) for one in made if len(one.units) > 2] == [SumMerge, RowMerge, RankingMerge, NeuronConceptMerge]
    # Some ranks are certain, and others are not: shards left neurons out.
    assert undivided.sql("select count(distinct certified) as n from rankings").to_pylist() == [{"n": 2}]


def test_shards_are_cut_alike_so_that_no_piece_is_read_twice(unmerged: Path, settings: dict[str, Any]) -> None:
    job = CensusJob(census_settings(settings | {"out": str(unmerged)}))
    receipts = RunFolder.at(unmerged).receipts()
    bounds = [[one.bounds[part]["concept"] for part in ranges.pieces_of(one, "concepts")] for one in receipts.values()]
    cuts = ranges.cuts_in(receipts[0])
    assert len(cuts) > 2
    assert all(bisect(cuts, first) == bisect(cuts, last) for pieces in bounds for first, last in pieces)
    made = chain(*job.partial_merges(job.plan(), Parts(RunFolder.at(unmerged), receipts, job.parts)))
    (units,) = (one.units for one in made if isinstance(one, RankingMerge))
    read = [
        part
        for unit in units
        for receipt in receipts.values()
        for part in ranges.pieces_within(receipt, "concepts", *unit.payload)
    ]
    assert len(read) == sum(map(len, bounds))


def test_shards_in_pieces_are_merged_alone_as_well(
    unmerged: Path, settings: dict[str, Any], undivided: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_merge, "LARGE", 1 << 40)
    monkeypatch.setattr(RowMerge, "merger", None)
    census_here(**settings, out=unmerged)
    check(unmerged, undivided)


def test_shards_of_an_earlier_version_are_merged_alone(
    unmerged: Path, settings: dict[str, Any], undivided: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unmerged / "receipts/000003.json").unlink()
    with monkeypatch.context() as before:
        before.setattr(ranges, "NEURONS", 1 << 16)
        census_here(**settings, out=unmerged)
    check(unmerged, undivided)


def test_a_merge_may_die_at_any_moment(unmerged: Path, settings: dict[str, Any], undivided: Run) -> None:
    changes = Life(1 << 20)

    def counted(uri: str | Path) -> Store:
        return Mortal(open_store(uri), changes)

    shutil.copytree(unmerged, unmerged.parent / "counted")
    with patch.object(folder, "open_store", counted):
        census_here(**settings, out=unmerged.parent / "counted")
    made = (1 << 20) - changes.left
    for number in range(KILLS):
        out = unmerged.parent / f"killed-{number}"
        shutil.copytree(unmerged, out)
        with dying((2 * number + 1) * made // (2 * KILLS)), pytest.raises(Killed):
            census_here(**settings, out=out)
        left = {path: path.stat().st_mtime_ns for path in out.glob("merging/*/*/receipts/*")}
        census_here(**settings, out=out)
        check(out, undivided)
        assert number < KILLS // 2 or left


def test_a_unit_that_fails_ends_the_merge_and_is_tried_again(
    unmerged: Path, settings: dict[str, Any], undivided: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(partial_merge, "sorted_by_neuron", None)
        with pytest.raises(InputError, match=r"failed in neuron_concepts, unit 0 \(.*TypeError.*; run again"):
            census_here(**settings, out=unmerged)
    census_here(**settings, out=unmerged)
    check(unmerged, undivided)


def test_a_damaged_piece_is_named_and_made_again(unmerged: Path, settings: dict[str, Any], undivided: Run) -> None:
    piece = next(unmerged.glob("shards/000002/*-totals.001.parquet"))
    piece.write_bytes(bytes(reversed(piece.read_bytes())))
    assert [problem.path for problem in verify_run(open_run(unmerged).folder).problems] == [str(piece)]
    with pytest.raises(InputError, match=rf"{piece.name}: changed .*; remove receipts/000002.json and run"):
        census_here(**settings, out=unmerged)
    (unmerged / "receipts/000002.json").unlink()
    census_here(**settings, out=unmerged)
    check(unmerged, undivided)


def test_a_refresh_merges_by_ranges_again(
    small: None, settings: dict[str, Any], undivided: Run, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    whole = pq.read_table(settings["data"])
    pq.write_table(whole.slice(0, 15), data / "0.parquet")
    census_here(**settings | {"data": str(data)}, out=tmp_path / "run")
    pq.write_table(whole.slice(15), data / "1.parquet")
    refresh_run(str(tmp_path / "run"), local=True)
    check(tmp_path / "run", undivided)


class OnceDeadly(RankingMerge):
    """Ends the worker's process on the first attempt at a range."""

    def merger(self, context: Any) -> Any:
        merge, mark = super().merger(context), Path(self.target, "died")

        def die_first(concepts: Any) -> Any:
            if not mark.exists():
                mark.write_bytes(b"")
                os._exit(1)
            return merge(concepts)

        return die_first


@pytest.mark.slow
@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("workers", ["1", "3"])
def test_actors_and_their_deaths_change_nothing(
    workers: str, unmerged: Path, settings: dict[str, Any], undivided: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_merge, "RankingMerge", OnceDeadly)
    run_census(census_settings(settings | {"out": str(unmerged), "workers": workers}))
    assert (unmerged / "died").exists()
    check(unmerged, undivided)


def test_workers_of_a_merge_load_no_torch() -> None:
    code = f"import sys, {PartialMerge.__module__}; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["set()"]
