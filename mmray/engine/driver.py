"""The driver of every job: plan, lease, begin or resume, hand out, merge, make visible."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmray.engine.executors import Executor, executor_for
from mmray.engine.job import Job, JobResult, Output, Parts, Plan, Progress
from mmray.engine.units import WorkOrder
from mmray.errors import InputError
from mmray.runs import Receipt, RunFolder
from mmray.runs.driver import drive_analysis, open_target
from mmray.runs.lease import Lease
from mmray.runs.receipts import receipts_digest
from mmray.runs.snapshots import SnapshotWriter, is_published, newest_readable, next_fence, publish
from mmray.storage import Store, with_retries
from mmray.version import VERSION

Follow = Callable[[Progress], None]

LIBRARIES = ("torch", "transformers", "ray", "pyarrow")
"""Whose versions run.json notes."""


@dataclass(frozen=True)
class _Begun:
    """A job whose folder is there."""

    job: Job[Any, Any]
    plan: Plan[Any]
    folder: RunFolder
    fingerprint: str
    lease: Lease
    target: Store
    """Where its tables and files go."""
    fence: int
    """Number of its snapshots."""


def run(
    job: Job[Any, Any],
    *,
    plan: Plan[Any] | None = None,
    executor: Executor | None = None,
    follow: Follow = lambda _: None,
    lease: Lease | None = None,
) -> JobResult:
    """Run a job to its end, or resume one that stopped, and write what it amounts to.

    `follow` is told of every committed unit, and nothing where there is no work. `plan` and `lease` are given by a
    caller that has them already. Raises InputError for anything wrong with the set-up, before any work, and where
    another driver is at work on the same job.
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
    """Run jobs with one set of workers: units of one group run on one actor, whichever job they are of.

    The first job's class makes the workers of all. Jobs are merged in the order given. `seconds` of each result are
    those of all. Otherwise as `run`.
    """
    plans = [job.plan() for job in jobs] if plans is None else plans
    return _run_teams([list(zip(jobs, plans, strict=True))], executor, follow, lease)[0]


def run_side_by_side(
    jobs: Sequence[Job[Any, Any]], *, executor: Executor | None = None, follow: Follow = lambda _: None
) -> list[JobResult]:
    """Run jobs that share nothing at the same time, each with workers of its own; in turn without a cluster.

    They take equal parts of the cluster, and what one leaves the others get. `follow` is told of all of them together.
    Jobs are merged in the order given, when all are done. Otherwise as `run`.
    """
    return [results[0] for results in _run_teams([[(job, job.plan())] for job in jobs], executor, follow)]


def _run_teams(
    teams: Sequence[Sequence[tuple[Job[Any, Any], Plan[Any]]]],
    executor: Executor | None,
    follow: Follow,
    lease: Lease | None = None,
) -> list[list[JobResult]]:
    """Run jobs that are planned already: planning first, what is wrong with the set-up leaves no trace."""
    began = time.perf_counter()
    with ExitStack() as stack:
        begun: list[list[_Begun]] = [[] for _ in teams]
        for team, started in zip(teams, begun, strict=True):
            for job, plan in team:
                held = lease or stack.enter_context(drive_analysis(job.place))
                started.append(with_retries(partial(_begin, job, plan, held)))
        worked = _run_pending(begun, executor or executor_for(teams[0][0][0].settings), follow)
        return [
            [_finish(one, began, worked=any_work) for one in team] for team, any_work in zip(begun, worked, strict=True)
        ]


def _begin(job: Job[Any, Any], plan: Plan[Any], lease: Lease) -> _Begun:
    target = open_target(job.target)
    fence = next_fence(target, job.name, lease.number)
    settings = plan.settled or job.settings
    fingerprint = settings.fingerprint(plan.digests)
    folder = RunFolder.at(job.folder(fingerprint))
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
            **plan.facts,
        },
        plan.manifest or json.dumps({"units": len(plan.units), "sizes": [unit.size for unit in plan.units]}).encode(),
    )
    # Whether its store commits by name is known only now that the folder has begun.
    folder = RunFolder.at(job.folder(fingerprint))
    return _Begun(job, plan, folder, fingerprint, lease, target, fence)


def _run_pending(teams: Sequence[Sequence[_Begun]], executor: Executor, follow: Follow) -> list[bool]:
    """Have every unit done that is neither committed nor quarantined; return for each team whether there was any."""
    done: list[Receipt] = []
    orders = [_order(team, done) for team in teams]
    work = [(order, groups) for order, groups in orders if groups]
    everyone = [one for team in teams for one in team]
    total = sum(unit.size for one in everyone for unit in one.plan.units)
    size, failures = sum(receipt.samples for receipt in done), sum(receipt.failures for receipt in done)
    quarantined = sum(receipt.reason is not None for receipt in done)
    if not work:
        return [False] * len(teams)
    told = Progress(size, total, failures, quarantined)
    follow(told)
    with executor.session():
        for answers in executor.answers(*work[0]) if len(work) == 1 else executor.side_by_side(work):
            for answer in answers:
                if answer.problem:
                    raise InputError(answer.problem)
                size += answer.size
                failures += answer.failures
                quarantined += bool(answer.reason)
            for one in everyone:
                one.lease.check()
            progress = Progress(size, total, failures, quarantined)
            # A unit may be no sample, such as one that decodes neurons.
            if progress != told:
                follow(progress)
            told = progress
    return [bool(groups) for _, groups in orders]


def _order(begun: Sequence[_Begun], done: list[Receipt]) -> tuple[WorkOrder, list[list[int]]]:
    """Return what the workers of a team are given, and its pending units by group; adds the receipts of the others."""
    order = WorkOrder(
        [one.job for one in begun],
        [one.plan.context for one in begun],
        [one.plan.units for one in begun],
        [one.folder.store.uri for one in begun],
        [one.fingerprint for one in begun],
        begun[0].job.settings.unit_timeout,
    )
    groups: dict[Any, list[int]] = {}
    start = 0
    for one in begun:
        known = one.folder.repair()
        if not one.job.settings.retry_failed:
            known |= one.folder.quarantined(known)
        done += known.values()
        pending = [number for number in range(len(one.plan.units)) if number not in known]
        one.folder.reopen(pending)
        for number in pending:
            group = one.plan.units[number].group
            groups.setdefault((start + number) if group is None else ("group", group), []).append(start + number)
        start += len(one.plan.units)
    return order, list(groups.values())


def _finish(begun: _Begun, began: float, *, worked: bool) -> JobResult:
    """Merge what is committed, unless the tables are made from it already, and return what it amounts to."""
    job, folder, store = begun.job, begun.folder, begun.target
    while True:
        parts = _complete(begun)
        made_from = {
            "fingerprint": begun.fingerprint,
            "receipts": receipts_digest(parts.receipts),
            "settings": json.dumps(job.settings.merge_settings(), sort_keys=True),
        }
        snapshot = newest_readable(store, job.name)
        if snapshot is not None and snapshot.made_from == made_from and not any(snapshot.verify(store)):
            headline = snapshot.headline
            if not is_published(store, snapshot):
                publish(begun.lease.guard(store), snapshot)
        else:
            headline = _merge(begun, parts, made_from)
            worked = True
        # What a late worker commits meanwhile is taken in too.
        if folder.committed() == parts.receipts.keys():
            break
    return JobResult(
        job=job.name,
        done=sum(receipt.samples for receipt in parts.receipts.values()),
        failures=sum(receipt.failures for receipt in parts.receipts.values()),
        quarantined=folder.reasons(parts.receipts),
        seconds=time.perf_counter() - began,
        headline=headline,
        parts=parts,
        already=not worked,
    )


def _complete(begun: _Begun) -> Parts:
    """Return the committed parts; raises InputError unless each unit is committed or quarantined."""
    folder, units = begun.folder, begun.plan.units
    receipts = folder.receipts()
    quarantined = folder.reasons(receipts)
    missing = [number for number in range(len(units)) if number not in receipts and number not in quarantined]
    if missing:
        raise InputError(
            f"{folder.store.uri}: {len(missing)} of {len(units)} units are neither committed nor quarantined "
            f"(the first is unit {missing[0]}); run the same command again"
        )
    return Parts(folder, receipts, begun.job.parts)


def _merge(begun: _Begun, parts: Parts, made_from: dict[str, str]) -> Mapping[str, Any]:
    """Merge the parts and make what comes of them visible; return the headline."""
    job, lease = begun.job, begun.lease
    guarded = lease.guard(begun.target)
    output = Output(SnapshotWriter(guarded, job.name, begun.fence))
    headline = job.merge(begun.plan, parts, output)
    for key, data in output.files.items():
        guarded.put(key, data)
    if output.snapshot.tables:
        publish(guarded, output.snapshot.commit(made_from, headline))
    return headline
