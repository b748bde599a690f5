"""A census killed before, within and after each of its changes to storage is made good by the next one."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pytest

from mmray.engine.units import UnitRunner
from mmray.errors import InputError
from mmray.features.census import job
from mmray.features.census.job import run_census
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.census.tables import TABLES
from mmray.runs import RunFolder
from mmray.runs.run import open_run
from mmray.storage import Entry, LocalStore, open_store
from tests.support.broken_stores import Appended, ReceiptFirst
from tests.support.kills import cheap_processes, folders_of, within_a_commit, work
from tests.support.scenes import scenes, write
from tests.support.stores import Killed, Mortal, dying
from tests.support.tables import same_tables


class HalfWritten(Mortal):
    """Leaves behind what a kill leaves that comes in the middle of a local write: a temporary file."""

    def commit(self, key: str, data: bytes) -> bool:
        try:
            return super().commit(key, data)
        except Killed:
            root = Path(self.uri)
            if root.is_dir():
                (root / f".tmp-{-self.life.left}").write_bytes(data[: len(data) // 2])
            raise


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    """A folder in memory: a hundred censuses write here, and each syncs eighty files."""
    return Path(tempfile.mkdtemp(dir=memory))


@pytest.fixture
def settings(tiny: Callable[[str], Path], tmp_path: Path) -> CensusSettings:
    data = write(tmp_path / "data.parquet", scenes(4))
    values = {"model": str(tiny("llava")), "data": str(data), "out": "elsewhere", "shard_size": 2, "top_k": 3}
    return census_settings(values | {"local": True})


def run(settings: CensusSettings, kind: type[RunFolder] = RunFolder, changes: int | None = None) -> bool:
    """Run the census with this kind of folder, to its n-th change; return whether it came to its end."""
    with ExitStack() as stack:
        stack.enter_context(folders_of(kind))
        stack.enter_context(patch.object(job, "load_model", load_once))
        if changes is not None:
            stack.enter_context(dying(changes, HalfWritten))
        try:
            return run_census(settings).complete
        except Killed:
            return False


load_once = cache(job.load_model)


def check_any_death(settings: CensusSettings, kind: type[RunFolder], root: Path) -> int:
    """Kill a census before each of its changes, and have another bring it to its end; return how often it was."""
    whole = settings.model_copy(update={"out": str(root / "undisturbed")})
    assert run(whole)
    undisturbed = open_run(root / "undisturbed")
    for change in range(200):
        out = root / f"killed-{change}"
        here = settings.model_copy(update={"out": str(out)})
        died = not run(here, kind, change)
        keys = {entry.key for entry in LocalStore(out).list("shards/")}
        for receipt in RunFolder(LocalStore(out)).receipts().values():
            assert receipt.parts is not None
            assert keys.issuperset(receipt.parts.values())
        assert run(here, kind)
        same_tables(open_run(out), undisturbed)
        assert not any(entry.key.rpartition("/")[2].startswith(".tmp") for entry in open_store(out).list())
        shutil.rmtree(out)
        if not died:
            return change
    raise AssertionError("the census never came to its end")


@pytest.mark.slow
def test_a_census_may_die_at_any_moment(settings: CensusSettings, tmp_path: Path) -> None:
    # Two shards of seven parts, their receipts and attempts; what neurons write; run, manifest and lease, twice; seven
    # tables, what makes them visible, and their copies.
    assert check_any_death(settings, RunFolder, tmp_path) >= 2 * (7 + 2) + (2 + 2) + 2 * 3 + 7 + 1 + 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ReceiptFirst, Appended])
def test_a_broken_commit_would_be_noticed(settings: CensusSettings, tmp_path: Path, kind: type[RunFolder]) -> None:
    with pytest.raises((AssertionError, InputError, pa.ArrowInvalid)):
        check_any_death(settings, kind, tmp_path)


def die(*_: object) -> None:
    raise Killed


def committed_objects(out: Path) -> list[Entry]:
    return [*open_store(out).list("shards/"), *open_store(out).list("receipts/")]


@pytest.mark.slow
def test_a_worker_that_wakes_after_its_shard_was_redone(settings: CensusSettings, tmp_path: Path) -> None:
    out = tmp_path / "run"
    here = settings.model_copy(update={"out": str(out)})
    # A driver begins the run, and dies before its first unit.
    with patch.object(UnitRunner, "run", die), pytest.raises(Killed):
        run_census(here)
    sleeper = cheap_processes().Process(target=work, args=(here.model_dump(), 0))
    sleeper.start()
    try:
        until = time.monotonic() + 60
        while not within_a_commit(open_store(out)):
            assert time.monotonic() < until
            assert sleeper.is_alive()
            time.sleep(0.01)
        # It falls asleep with its parts written and without a receipt, and another does its shard, and the rest.
        os.kill(sleeper.pid or 0, signal.SIGSTOP)
        assert within_a_commit(open_store(out))
        assert run(here)
        tables = {name: open_run(out).table(name) for name in TABLES}
        committed = {entry.key: open_store(out).read(entry.key) for entry in committed_objects(out)}
        os.kill(sleeper.pid or 0, signal.SIGCONT)
        sleeper.join(60)
        assert sleeper.exitcode == 0
    finally:
        sleeper.kill()
    left = {entry.key: open_store(out).read(entry.key) for entry in committed_objects(out)}
    # What it had written is gone, and what the other committed stands.
    assert left.items() < committed.items()
    assert len(left) == 2 * 8
    assert run(here)
    assert all(open_run(out).table(name).equals(table) for name, table in tables.items())
