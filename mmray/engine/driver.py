"""The driver of every job: plan, take the lease, begin or resume, hand out units, merge, publish."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmray.engine.executors import Executor, executor_for
from mmray.engine.job import PARTIAL, Job, JobResult, Output, Parts, Plan, Progress
from mmray.engine.units import WorkOrder
from mmray.errors import InputError
from mmray.runs import Receipt, RunFolder
from mmray.runs.card import publish
from mmray.runs.driver import drive_analysis, open_target
from mmray.runs.lease import Lease
from mmray.runs.receipts import receipts_digest
from mmray.runs.snapshots import SnapshotWriter, is_published, newest_readable, next_fence
from mmray.storage import Store, with_retries
from mmray.version import VERSION

Follow = Callable[[Progress], None]
"""Called after every committed unit."""

DELETED_TOGETHER = 8
"""Objects that are deleted in parallel."""
LIBRARIES = ("torch", "transformers", "ray", "pyarrow")
"""Libraries whose versions run.json records."""


@dataclass(frozen=True)
class _StartedJob:
    """A job whose lease is held and whose folder exists."""

    job: Job[Any, Any]
    plan: Plan[Any]
    folder: RunFolder
    fingerprint: str
    lease: Lease
    target: Store
    """Store of its tables and files."""
    fence: int
    """Fencing token of its snapshots."""


def run(
    job: Job[Any, Any],
    *,
    plan: Plan[Any] | None = None,
    executor: Executor | None = None,
    follow: Follow = lambda _: None,
    lease: Lease | None = None,
) -> JobResult:
    """Run a job to its end, or resume it, and write its tables.

    `follow` is not called if there is nothing to do. Pass `plan` and `lease` if you already have them. Raises
    InputError, before any work, for anything wrong with the set-up, or if another driver runs the same job.
    """
    plans = None if plan is None else [plan]
    return run_together([job], plans=plans, executor=executor, follow=follow, lease=lease)[0]


def run_together(
    jobs: Sequence[Job[Any, Any]],
    *,
    plans: Sequence[Plan[Any]] | None = None,
    executor: Executor | None = None,
    follow: Follow = lambda _: None,
    lease: Lease | None = None,
) -> list[JobResult]:
    """Run jobs with shared workers: units of one group run on one actor, whichever job they belong to.

    The first job's class creates the workers. Jobs are merged in the order given. `seconds` of each result is the
    total. Otherwise like `run`.
    """
    plans = [job.plan() for job in jobs] if plans is None else plans
    return _run_teams([list(zip(jobs, plans, strict=True))], executor, follow, lease)[0]


def run_side_by_side(
    jobs: Sequence[Job[Any, Any]], *, executor: Executor | None = None, follow: Follow = lambda _: None
) -> list[JobResult]:
    """Run independent jobs at the same time, each with its own workers; one after the other without a cluster.

    They get equal shares of the cluster, and take over what others leave. `follow` gets their total progress. Jobs are
    merged in the order given, after all units are done. Otherwise like `run`.
    """
    return [results[0] for results in _run_teams([[(job, job.plan())] for job in jobs], executor, follow)]


def _run_teams(
    teams: Sequence[Sequence[tuple[Job[Any, Any], Plan[Any]]]],
    executor: Executor | None,
    follow: Follow,
    lease: Lease | None = None,
) -> list[list[JobResult]]:
    """Run teams of jobs with shared workers; they are planned already, so that a bad set-up leaves no trace."""
    began = time.perf_counter()
    with ExitStack() as stack:
        started: list[list[_StartedJob]] = [[] for _ in teams]
        for team, begun in zip(teams, started, strict=True):
            for job, plan in team:
                held = lease or stack.enter_context(drive_analysis(job.root))
                begun.append(with_retries(partial(_begin, job, plan, held)))
        worked = _run_pending(started, executor or executor_for(teams[0][0][0].settings), follow)
        return [
            [_finish(one, began, executor, follow, worked=any_work) for one in team]
            for team, any_work in zip(started, worked, strict=True)
        ]


def _begin(job: Job[Any, Any], plan: Plan[Any], lease: Lease) -> _StartedJob:
    target = open_target(job.target)
    fence = next_fence(target, job.name, lease.number)
    settings = plan.settings or job.settings
    fingerprint = settings.fingerprint(plan.digests)
    folder = RunFolder.at(job.folder(fingerprint))
    # A mistyped first call leaves a folder without results; don't refuse the corrected one.
    folder.make_way(fingerprint)
    folder.begin(
        {
            "job": job.name,
            "settings": settings.model_dump(exclude={"address"}),
            "result_settings": settings.result_settings(),
            "digests": dict(plan.digests),
            "fingerprint": fingerprint,
            "shards": len(plan.units),
            "home": str(Path.cwd()),
            "versions": {"mmray": VERSION, "python": platform.python_version()}
            | {name: version(name) for name in LIBRARIES},
            **plan.run_info,
        },
        plan.manifest or json.dumps({"units": len(plan.units), "sizes": [unit.size for unit in plan.units]}).encode(),
    )
    # Open it again: only after `begin` does the folder say whether its store commits by name.
    folder = RunFolder.at(job.folder(fingerprint))
    return _StartedJob(job, plan, folder, fingerprint, lease, target, fence)


def _run_pending(teams: Sequence[Sequence[_StartedJob]], executor: Executor, follow: Follow) -> list[bool]:
    """Run every unit that is neither committed nor quarantined; return for each team whether there was any."""
    done: list[Receipt] = []
    orders = [_order(team, done) for team in teams]
    work = [(order, groups) for order, groups in orders if groups]
    jobs = [job for team in teams for job in team]
    total = sum(unit.size for job in jobs for unit in job.plan.units)
    size, failures = sum(receipt.samples for receipt in done), sum(receipt.failures for receipt in done)
    quarantined = sum(receipt.reason is not None for receipt in done)
    if not work:
        return [False] * len(teams)
    last = Progress(size, total, failures, quarantined, "loading the model")
    follow(last)
    with executor.session():
        for outcomes in executor.run(*work[0]) if len(work) == 1 else executor.run_side_by_side(work):
            for outcome in outcomes:
                if outcome.problem:
                    raise InputError(outcome.problem)
                size += outcome.size
                failures += outcome.failures
                quarantined += bool(outcome.reason)
            for job in jobs:
                # Only reads the flag of the renewing thread; writes of tables ask the storage itself.
                job.lease.check()
            progress = Progress(size, total, failures, quarantined)
            # Units without samples, such as those that decode neurons, change no count.
            if progress != last:
                follow(progress)
            last = progress
    follow(replace(last, phase="merging"))
    return [bool(groups) for _, groups in orders]


def _order(team: Sequence[_StartedJob], done: list[Receipt]) -> tuple[WorkOrder, list[list[int]]]:
    """Return a team's work order and its pending units by group; appends the receipts of the other units to `done`."""
    order = WorkOrder(
        [one.job for one in team],
        [one.plan.context for one in team],
        [one.plan.units for one in team],
        [one.folder.store.uri for one in team],
        [one.fingerprint for one in team],
        team[0].job.settings.unit_timeout,
    )
    groups: dict[Any, list[int]] = {}
    start = 0
    for one in team:
        # Damaged units are discarded here, by the only process that holds the lease.
        known = one.folder.repair()
        if not one.job.settings.retry_failed:
            known |= one.folder.quarantined(known)
        done += known.values()
        pending = [number for number in range(len(one.plan.units)) if number not in known]
        one.folder.reopen(pending)
        for number in pending:
            group = one.plan.units[number].group
            # A unit without a group is a group of its own; the tuple keeps group names apart from unit numbers.
            groups.setdefault((start + number) if group is None else ("group", group), []).append(start + number)
        start += len(one.plan.units)
    return order, list(groups.values())


def _finish(
    started: _StartedJob, began: float, executor: Executor | None, follow: Follow, *, worked: bool
) -> JobResult:
    """Merge what is committed, unless the tables are up to date, and return the result."""
    job, folder, store = started.job, started.folder, started.target
    while True:
        parts = _complete(started)
        made_from = {
            "fingerprint": started.fingerprint,
            "receipts": receipts_digest(parts.receipts),
            "settings": json.dumps(job.settings.merge_settings(), sort_keys=True),
        }
        snapshot = newest_readable(store, job.name)
        if snapshot is not None and snapshot.made_from == made_from and not any(snapshot.verify(store)):
            headline = snapshot.headline
            if not is_published(store, snapshot):
                publish(started.lease.guard(store), snapshot)
        else:
            headline = _merge(started, parts, made_from, executor, follow)
            worked = True
        # A late worker may have committed a quarantined unit during the merge: then merge again.
        if folder.committed() == parts.receipts.keys():
            break
    # Not within the merge: a driver that died after it has left them, too.
    root = started.lease.guard(RunFolder.at(job.root).store)
    with ThreadPoolExecutor(DELETED_TOGETHER) as pool:
        list(pool.map(lambda entry: root.delete(entry.key), root.list(f"{PARTIAL}/")))
    return JobResult(
        job=job.name,
        done=sum(receipt.samples for receipt in parts.receipts.values()),
        failures=sum(receipt.failures for receipt in parts.receipts.values()),
        quarantined=folder.reasons(parts.receipts),
        seconds=time.perf_counter() - began,
        headline=headline,
        parts=parts,
        already_done=not worked,
    )


def _complete(started: _StartedJob) -> Parts:
    """Return the committed parts; raises InputError unless each unit is committed or quarantined."""
    folder, units = started.folder, started.plan.units
    receipts = folder.receipts()
    quarantined = folder.reasons(receipts)
    missing = [number for number in range(len(units)) if number not in receipts and number not in quarantined]
    if missing:
        raise InputError(
            f"{folder.store.uri}: {len(missing)} of {len(units)} units are neither committed nor quarantined "
            f"(the first is unit {missing[0]}); run the same command again"
        )
    return Parts(folder, receipts, started.job.parts)


def _merge(
    started: _StartedJob, parts: Parts, made_from: dict[str, str], executor: Executor | None, follow: Follow
) -> Mapping[str, Any]:
    """Merge the parts, publish tables and files, and return the headline."""
    job, lease = started.job, started.lease
    if steps := job.partial_merges(started.plan, parts):
        executor = executor or executor_for(steps[0][0].settings)
        receipts = parts.receipts.values()
        size, failures = sum(one.samples for one in receipts), sum(one.failures for one in receipts)
        quarantined = len(started.plan.units) - len(receipts)

        def tell(names: str, merged: Progress) -> None:
            step = f"{names}, {merged.done} of {merged.total}"
            follow(Progress(size, size, failures, quarantined, "merging", step))

        # One session for all: to start Ray takes seconds.
        with executor.session():
            for step in steps:
                told = partial(tell, " and ".join(one.name for one in step))
                for done in run_together(step, executor=executor, follow=told, lease=lease):
                    for number, reason in done.quarantined.items():
                        failed = f"{done.job}, unit {number} ({reason})"
                        raise InputError(f"{job.root}: the merge failed in {failed}; run again")
    guarded = lease.guard(started.target)
    output = Output(SnapshotWriter(guarded, job.name, started.fence))
    headline = job.merge(started.plan, parts, output)
    # Each of these writes checks the lease, so that a driver that has lost it replaces nothing.
    for key, data in output.files.items():
        guarded.put(key, data)
    if output.snapshot.tables:
        publish(guarded, output.snapshot.commit(made_from, headline))
    return headline
