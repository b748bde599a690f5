"""A census on a real local Ray: workers, shards, kills and resumes leave the same tables."""

import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmray.demo import DATA
from mmray.engine import Progress
from mmray.features.census.job import CensusResult, run_census
from mmray.features.census.settings import census_settings
from mmray.runs.run import Run, open_run
from mmray.storage import open_store
from tests.support.faults import SETTINGS, Fault, faulty

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]

SAMPLES = SETTINGS["limit"]
EXACT = {
    "captions": ("sample_id", "caption", "source", "language", "domain"),
    "occurrences": ("sample_id", "concept", "token", "token_id", "position"),
    "rankings": ("concept", "rank", "neuron", "specific_rank", "selective_rank", "n", "share", "certified", "tokens"),
    "neurons": ("neuron", "n_concepts", "n_tokens", "n_active", "tokens", "suppressed"),
    "activity": ("label_kind", "label", "modality", "layer", "unit", "n_tokens", "n_active"),
    "examples": ("layer", "unit", "sign", "rank", "sample_id", "position"),
    "errors": ("sample_id", "stage", "message"),
}
"""Columns that must be equal; those in `NEAR` may differ by the rounding of sums."""
NEAR = {
    "occurrences": ("log_prob",),
    "rankings": ("score", "score_std", "specific", "selective", "activation"),
    "neurons": ("mean", "std", "max", "min"),
    "activity": ("sum", "sum_squares"),
    "examples": ("activation",),
}
BY_SAMPLE = {"captions": ["sample_id"], "occurrences": ["sample_id", "position"], "errors": ["sample_id"]}
"""Tables whose rows stand in the order of shards; they are compared in this one."""


def census(out: Path | str, follow: Callable[[Progress], None] = lambda _: None, **settings: object) -> CensusResult:
    return run_census(census_settings(SETTINGS | {"out": str(out), "workers": 1} | settings), follow)


def same_tables(run: Run, other: Run) -> None:
    for name, columns in EXACT.items():
        ours, theirs = run.table(name), other.table(name)
        if name in BY_SAMPLE:
            order = [(column, "ascending") for column in BY_SAMPLE[name]]
            ours, theirs = ours.sort_by(order), theirs.sort_by(order)
        for column in columns:
            assert ours[column].to_pylist() == theirs[column].to_pylist(), (name, column)
        for column in NEAR.get(name, ()):
            # Sums over tokens are compared as means: what cancels out leaves the rounding of what was summed.
            scale = np.maximum(theirs["n_tokens"].to_numpy(), 1) if column.startswith("sum") else 1
            ours_scaled, theirs_scaled = ours[column].to_numpy() / scale, theirs[column].to_numpy() / scale
            np.testing.assert_allclose(ours_scaled, theirs_scaled, rtol=1e-5, atol=1e-6, err_msg=f"{name} {column}")


def receipts(run: Path | str) -> dict[str, bytes]:
    store = open_store(run)
    return {entry.key: store.read(entry.key) for entry in store.list("receipts/")}


def attempts(run: Path | str) -> list[str]:
    return [entry.key.removeprefix("attempts/") for entry in open_store(run).list("attempts/")]


def caption_of(sample: int) -> str:
    """A caption that no other sample of the census has."""
    captions = pq.read_table(DATA, columns=["caption"])["caption"].to_pylist()[:SAMPLES]
    return next(caption for caption in captions[sample:] if captions.count(caption) == 1)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[float]]:
    """An undisturbed run, and for each of its shards the seconds from its commit until it was told."""
    out = tmp_path_factory.mktemp("census") / "undisturbed"
    delays: list[float] = []

    def follow(progress: Progress) -> None:
        times = sorted(path.stat().st_mtime for path in out.glob("receipts/*.json"))
        if progress.done == 32 * (len(delays) + 1):
            delays.append(time.time() - times[len(delays)])

    assert census(out, follow).complete
    return open_run(out), delays


@pytest.fixture(scope="module")
def undisturbed(followed: tuple[Run, list[float]]) -> Run:
    return followed[0]


def test_progress_follows_what_is_committed(followed: tuple[Run, list[float]]) -> None:
    assert len(followed[1]) == 3
    assert max(followed[1]) < 0.7


def test_every_sample_is_analysed_once(undisturbed: Run) -> None:
    given = pq.read_table(DATA, columns=["sample_id"])["sample_id"].to_pylist()[:SAMPLES]
    assert undisturbed.table("captions")["sample_id"].to_pylist() != []
    assert sorted(undisturbed.table("captions")["sample_id"].to_pylist()) == sorted(given)
    counted = undisturbed.sql("select concept, count(*) as n from occurrences group by concept")
    ranked = undisturbed.sql("select distinct concept, n from rankings")
    assert sorted(map(str, counted.to_pylist())) == sorted(map(str, ranked.to_pylist()))


def test_workers_and_shards_change_nothing(undisturbed: Run, tmp_path: Path) -> None:
    assert census(tmp_path / "run", workers=3, shard_size=25).complete
    same_tables(open_run(tmp_path / "run"), undisturbed)


def test_workers_that_die_and_shards_that_never_succeed(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said: list[Progress] = []
    always_raises = Fault(caption_of(0), raises="no luck\nwith it")
    always_kills = Fault(caption_of(32))
    kills_once = Fault(caption_of(64), once=tmp_path / "killed")
    with faulty(always_raises, always_kills, kills_once):
        outcome = census(out, said.append)
    assert set(outcome.quarantined) == {0, 1}
    assert outcome.quarantined[0].startswith("given up after 3 attempts: RuntimeError: no luck")
    assert outcome.quarantined[1] == "given up after 3 attempts: the worker died without a word"
    assert not outcome.complete
    assert (said[-1].done, said[-1].quarantined) == (SAMPLES, 2)
    # The shard whose worker was killed once is there, at the second attempt, and whole.
    assert (tmp_path / "killed").exists()
    assert "000002/2" in attempts(out)
    assert "000002/3" not in attempts(out)
    run = open_run(out)
    given = pq.read_table(DATA, columns=["sample_id"])["sample_id"].to_pylist()[64:SAMPLES]
    assert sorted(run.table("captions")["sample_id"].to_pylist()) == sorted(given)
    assert (outcome.samples, run.status().quarantined) == (32, outcome.quarantined)
    # Run again, the others stay aside, unless it is asked for.
    before = attempts(out)
    committed = receipts(out)
    assert census(out).quarantined == outcome.quarantined
    assert attempts(out) == before
    assert census(out, retry_failed=True).complete
    assert committed.items() <= receipts(out).items()
    same_tables(open_run(out), undisturbed)


def test_data_and_run_on_s3(undisturbed: Run, ray_here: str) -> None:
    folder = f"s3://{ray_here}/{uuid.uuid4().hex}"
    open_store(folder).put("data/census.parquet", DATA.read_bytes())
    open_store(folder).put("data/concepts.json", (DATA.parent / "concepts.json").read_bytes())
    outcome = census(f"{folder}/run", data=f"{folder}/data")
    assert outcome.complete
    run = open_run(f"{folder}/run")
    assert run.uri == f"{folder}/run"
    same_tables(run, undisturbed)
    status = run.status()
    assert (status.shards_done, status.pending, status.samples_done, status.finished) == (3, 0, SAMPLES, True)
    concept = next(iter(run.concepts))
    assert run.rank(concept, 5)["neuron"].to_pylist() == undisturbed.rank(concept, 5)["neuron"].to_pylist()
