"""What holds of every job, whatever it computes: kills, leases, disks and settings change nothing in its tables.

The toy is disturbed at every change that it makes to storage, the others at a few. Their workers' results are
remembered from one undisturbed run each, so that what is tried again and again is the engine, the plan and the merge.
"""

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mmray.engine import Unit
from mmray.errors import InputError
from mmray.features import FEATURES
from mmray.runs import ATTEMPTS, RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.runs.snapshots import newest
from mmray.storage import retries
from tests.engine.disturbed import (
    Always,
    Change,
    Counted,
    Dies,
    Forgets,
    Full,
    LosesAnswer,
    Meanwhile,
    ReadOnly,
    disturbed,
)
from tests.engine.executors import DyingWorkers
from tests.engine.jobs import CASES, Case, Place
from tests.engine.suite import Suite, each
from tests.support.broken_stores import ReceiptFirst
from tests.support.stores import Killed

MOMENTS = 3
"""Changes of a job, drawn at random, at which it is disturbed; the toy is at all of them."""
TOY, OTHERS = CASES[0], CASES[1:]


every_job = each(CASES)


def changes_of(suite: Suite, case: Case) -> int:
    """Return how many changes to storage an undisturbed run makes."""
    if case.name not in suite.changes:
        suite.reference(case)
        counted = Counted()
        with disturbed(counted):
            case.run(suite.place(), suite.executor(case))
        suite.changes[case.name] = counted.made
    return suite.changes[case.name]


def moments_of(suite: Suite, case: Case) -> list[int]:
    """Return the changes at which a job is disturbed."""
    made = changes_of(suite, case)
    return list(range(made)) if case is TOY else sorted(random.Random(case.name).sample(range(made), MOMENTS))


# --- deaths


def check_a_death(suite: Suite, case: Case, moment: int) -> None:
    """Kill driver and workers before a change, and have the same command go on."""
    place = suite.place()
    with disturbed(Dies(moment)), suppress(Killed):
        case.run(place, suite.executor(case))
    check_receipts(case, place)
    suite.check(case, place, suite.run(case, place))


def check_receipts(case: Case, place: Place) -> None:
    """Fail where a receipt names a part that is not there."""
    folder = RunFolder.at(case.parts_folder(place))
    keys = {entry.key for entry in folder.store.list("shards/")}
    for receipt in folder.receipts().values():
        assert keys.issuperset((receipt.parts or {}).values()), f"receipt {receipt.shard_id} came before its parts"


@every_job
def test_a_death_of_the_driver_changes_nothing(suite: Suite, case: Case) -> None:
    for moment in moments_of(suite, case):
        check_a_death(suite, case, moment)


@every_job
def test_a_death_of_a_worker_changes_nothing(suite: Suite, case: Case) -> None:
    suite.reference(case)
    counted = Counted()
    case.run(suite.place(), DyingWorkers(suite.results, counted))
    moments = range(counted.made) if case is TOY else random.Random(case.name).sample(range(counted.made), 2)
    for moment in moments:
        place = suite.place()
        executor = DyingWorkers({} if case.saves else suite.results, Dies(moment))
        suite.check(case, place, case.run(place, executor))
        assert executor.killed == 1


def test_a_receipt_that_comes_first_would_be_noticed(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = moments_of(suite, TOY)
    monkeypatch.setattr(RunFolder, "commit_shard", ReceiptFirst.commit_shard)
    with pytest.raises(AssertionError, match="came before its parts"):
        for moment in moments:
            check_a_death(suite, TOY, moment)


# --- two drivers


@every_job
def test_a_second_driver_is_refused(suite: Suite, case: Case) -> None:
    place = suite.place()
    job = case.make(place)
    executor = suite.executor(case)
    with (
        drive_analysis(job.root),
        pytest.raises(InputError, match=rf"another driver is at work on this run \(process {os.getpid()} on "),
    ):
        case.run(place, executor)
    assert not executor.seen
    suite.check(case, place, suite.run(case, place))


def first_fails(case: Case, place: Place) -> Callable[[Unit], None]:
    """Return what fails before the first unit's work."""
    first = repr(case.make(place).plan().units[0])

    def fail(unit: Unit) -> None:
        if repr(unit) == first:
            raise RuntimeError("no luck")

    return fail


def run_first(suite: Suite, case: Case, place: Place) -> None:
    """Run what another driver will make other tables than.

    They differ by what the merge alone reads, or, of a job whose merge reads nothing else, by a unit that fails.
    """
    case.run(place, suite.executor(case, *() if case.later else (first_fails(case, place),)))


def changes_of_first(suite: Suite, case: Case) -> list[Change]:
    """Return all changes to storage of such a driver."""
    suite.reference(case)
    recorded = Meanwhile(0)
    with disturbed(recorded):
        run_first(suite, case, suite.place())
    return recorded.later


def check_a_late_driver(suite: Suite, case: Case, moment: int) -> None:
    """Stop a driver before a change, let another take over and do all, and let the first go on."""
    place = suite.place()
    job = case.make(place)
    leases = Path(job.root, "lease")
    theirs: list[dict[str, Any]] = []

    def take_over() -> None:
        for file in leases.glob("*.json"):
            # As if its owner were dead; the other takes the next number.
            file.write_text(file.read_text().replace('"released": false', '"released": true'))
        held.append(any(leases.glob("*.json")))
        theirs.append(case.left(place, suite.run(case, place, **case.later or {"retry_failed": True})))

    held: list[bool] = []
    meanwhile = Meanwhile(moment, happen=take_over)
    with disturbed(meanwhile):
        try:
            run_first(suite, case, place)
        except InputError as error:
            assert "another driver has taken" in str(error)
    store = RunFolder.at(job.target).store
    snapshot = newest(store, job.name)
    assert snapshot is not None
    if held == [True]:
        # What was in the making is written; nothing that its lease guards is written after that.
        guarded = [c for c in meanwhile.later[1:] if c.uri == store.uri and c.key.startswith(("tables/", "snapshots/"))]
        assert not guarded, f"written without a lease: {guarded[0].key}"
        for name in snapshot.tables:
            assert snapshot.read(store, name).equals(theirs[0][name]), f"{name} is an older one"
    suite.check(case, place, suite.run(case, place))


def test_a_late_driver_does_no_harm(suite: Suite) -> None:
    for moment in moments_of(suite, TOY):
        check_a_late_driver(suite, TOY, moment)


@each(case for case in OTHERS if case.name in FEATURES and FEATURES[case.name].tables)
def test_a_late_driver_of_another_job_does_no_harm(suite: Suite, case: Case) -> None:
    changes = changes_of_first(suite, case)
    merging = next(number for number, change in enumerate(changes) if change.key.startswith("snapshots/"))
    chance = random.Random(case.name)
    for moment in (chance.randrange(merging), chance.randrange(merging, len(changes))):
        check_a_late_driver(suite, case, moment)


def test_a_lease_that_nobody_looks_at_would_be_noticed(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    moments = moments_of(suite, TOY)
    monkeypatch.setattr(Lease, "verify", lambda _: None)
    with pytest.raises(AssertionError, match="written without a lease"):
        for moment in moments:
            check_a_late_driver(suite, TOY, moment)


@each(case for case in CASES if case.later)
def test_readers_see_one_version(suite: Suite, case: Case) -> None:
    place = suite.place()
    job = case.make(place)
    store = RunFolder.at(job.target).store
    versions = [_tables(suite, case), _tables(suite, case, **case.later)]
    seen: list[int] = []

    def read() -> None:
        snapshot = newest(store, job.name)
        if snapshot is not None:
            tables = {name: snapshot.read(store, name) for name in snapshot.tables}
            assert tables in versions
            seen.append(versions.index(tables))

    with disturbed(Always(happen=read)):
        case.run(place, suite.executor(case))
        case.run(place, suite.executor(case), **case.later)
    assert seen == sorted(seen)
    assert set(seen) == {versions.index(version) for version in versions}


def _tables(suite: Suite, case: Case, **settings: Any) -> dict[str, Any]:
    left = case.left(place := suite.place(), suite.run(case, place, **settings))
    return {name.removeprefix("tables/"): value for name, value in left.items() if name.startswith("tables/")}


# --- disks and answers


@every_job
def test_hard_links_and_the_folder_do_not_matter(suite: Suite, case: Case) -> None:
    # The run that all others are compared with had no hard links, and was begun from elsewhere.
    place = suite.place()
    suite.check(case, place, suite.run(case, place))


@every_job
def test_a_full_disk_blames_no_unit(suite: Suite, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    for moment in moments_of(suite, case):
        place = suite.place()
        with disturbed(Full(moment)):
            try:
                case.run(place, suite.executor(case))
            except (InputError, OSError) as error:
                assert "No space left on device" in str(error)
                assert "\n" not in str(error)
        assert not list(place.root.rglob("aside/*"))
        suite.check(case, place, suite.run(case, place))


@every_job
def test_a_disk_that_is_read_only_is_told_before_any_work(suite: Suite, case: Case) -> None:
    place, executor = suite.place(), suite.executor(case)
    with disturbed(ReadOnly()), pytest.raises(InputError, match=r"can't write here \(Read-only file system\)"):
        case.run(place, executor)
    assert not executor.seen


@every_job
def test_lost_answers_change_nothing(suite: Suite, case: Case) -> None:
    suite.reference(case)
    place = suite.place()
    with disturbed(Forgets()):
        result = case.run(place, suite.executor(case))
    suite.check(case, place, result)
    check_attempts(case, place)


def test_an_answer_that_is_lost_at_any_change(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.02)
    for moment in moments_of(suite, TOY):
        place = suite.place()
        with disturbed(LosesAnswer(moment)):
            result = TOY.run(place, suite.executor(TOY))
        suite.check(TOY, place, result)
        check_attempts(TOY, place)


def check_attempts(case: Case, place: Place) -> None:
    """Fail where a unit was begun a second time."""
    keys = [entry.key for entry in RunFolder.at(case.parts_folder(place)).store.list("attempts/")]
    assert all(key.endswith("/1") for key in keys), keys


# --- units and settings


@each(case for case in CASES if not case.single)
def test_the_third_failure_is_quarantined_and_the_rest_done(suite: Suite, case: Case) -> None:
    suite.reference(case)
    place = suite.place()
    units = case.make(place).plan().units
    executor = suite.executor(case, first_fails(case, place))
    result = case.run(place, executor)
    assert result.quarantined == {0: f"given up after {ATTEMPTS} attempts: RuntimeError: no luck"}
    assert list(result.parts.receipts) == list(range(1, len(units)))
    assert len(executor.seen) == len(units) - 1 + ATTEMPTS
    assert suite.run(case, place).quarantined
    suite.check(case, place, suite.run(case, place, retry_failed=True))


@every_job
def test_a_second_call_does_nothing(suite: Suite, case: Case) -> None:
    place, again = suite.place(), suite.executor(case)
    suite.run(case, place)
    before = files_of(case, place)
    suite.check(case, place, case.run(place, again))
    assert not again.seen
    assert files_of(case, place) == before


def files_of(case: Case, place: Place) -> dict[Path, int]:
    """Return when each file of a job was written; those of its leases and of the target itself aside."""
    files = case.parts_folder(place), *(Path(case.make(place).target, name) for name in ("tables", "snapshots"))
    found = (file for folder in files for file in folder.rglob("*") if "lease" not in file.parts)
    return {file: file.stat().st_mtime_ns for file in found if file.is_file()}


@every_job
def test_other_settings_are_refused_or_kept_apart(suite: Suite, case: Case) -> None:
    place, again = suite.place(), suite.executor(case)
    suite.run(case, place)
    if case.refused:
        with pytest.raises(InputError, match=r"another|other settings"):
            case.run(place, again, **case.change)
    else:
        other = suite.executor(case)
        assert case.fingerprint(place, **case.change) != case.fingerprint(place)
        case.run(place, other, **case.change)
        assert other.seen
    suite.check(case, place, case.run(place, again))
    assert not again.seen
