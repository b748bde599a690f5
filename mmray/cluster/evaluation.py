"""The driver of evaluations: settle the units of work, hand them to actors, sum up their rows, write the result.

EDIT/evaluations/FINGERPRINT/     the rows of each unit, committed once, as a run's shards are (`mmray.runs`)
EDIT/evaluation.json              the measures of the last evaluation that ended
EDIT/captions.parquet             its captions before and after
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.cluster.carrying import Folders, carry_out, pool_for
from mmray.cluster.described import described
from mmray.cluster.evaluation_plan import Plan, digests, plan_evaluation, units_json
from mmray.cluster.evaluation_worker import EvaluationWorker, Opener
from mmray.cluster.finished import Finished
from mmray.cluster.units import mapped_together
from mmray.editing.edit import open_edit
from mmray.engine import Progress
from mmray.evaluation.asks import Edit
from mmray.evaluation.scope import EDITED
from mmray.evaluation.settings import EvaluationSettings
from mmray.evaluation.summary import summarise
from mmray.results.run import Run, open_run
from mmray.runs import Receipt, RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.tables import CAPTIONS_FILE, EVALUATION_FILE, EVALUATION_SCHEMAS, to_bytes


@dataclass(frozen=True, kw_only=True)
class Evaluation(Finished):
    """What a finished evaluation amounts to; `measures` as evaluation.json has them."""

    edit: str
    measures: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    samples: int


def run_evaluation(
    settings: EvaluationSettings,
    follow: Callable[[Progress], None] = lambda _: None,
    opener: Opener = open_edit,
) -> Evaluation:
    """Evaluate an edit to the end, or go on with an evaluation that stopped, and write and return what it shows.

    `follow` hears of committed units. Raises InputError for anything wrong with the set-up, before any work.
    """
    return run_evaluations([settings], follow, opener)[0]


def run_evaluations(
    settings: Sequence[EvaluationSettings],
    follow: Callable[[Progress], None] = lambda _: None,
    opener: Opener = open_edit,
) -> list[Evaluation]:
    """Evaluate edits of one run together: the model is loaded, and asked before the edits, once for all of them.

    The settings differ in the edit alone; `seconds` of each outcome are those of all. Else as `run_evaluation`.
    """
    began = time.perf_counter()
    run, edits = open_run(settings[0].run, patient=True), [opener(one.edit) for one in settings]
    with ExitStack() as stack:
        leases = [stack.enter_context(drive_analysis(_evaluations(one.edit))) for one in settings]
        return _evaluated(settings, run, edits, opener, leases, follow, began)


def _evaluated(
    settings: Sequence[EvaluationSettings],
    run: Run,
    edits: Sequence[Edit],
    opener: Opener,
    leases: Sequence[Lease],
    follow: Callable[[Progress], None],
    began: float,
) -> list[Evaluation]:
    plans = [plan_evaluation(one, run, edit.purposes) for one, edit in zip(settings, edits, strict=True)]
    infos = [described(plan.settings, digests(plan, run), len(plan.units)) for plan in plans]
    folders = [
        RunFolder.at(f"{_evaluations(plan.settings.edit)}/{info['fingerprint']}", patient=True)
        for plan, info in zip(plans, infos, strict=True)
    ]
    for plan, info, folder in zip(plans, infos, folders, strict=True):
        folder.begin(info, units_json(plan))
    _work(plans, folders, opener, follow, leases)
    outcomes = []
    for plan, info, folder, edit, lease in zip(plans, infos, folders, edits, leases, strict=True):
        receipts = folder.receipts()
        measured, captions = _gathered(folder, receipts, plan)
        outcome = Evaluation(
            edit=plan.settings.edit,
            measures=summarise(measured, plan.settings),
            facts=edit.facts,
            samples=sum(receipt.samples for receipt in receipts.values()),
            failures=sum(receipt.failures for receipt in receipts.values()),
            quarantined=folder.reasons(receipts),
            seconds=time.perf_counter() - began,
        )
        _write(outcome, plan, info["fingerprint"], captions, lease)
        folder.finish({"samples": outcome.samples, "failures": outcome.failures})
        outcomes.append(outcome)
    return outcomes


def _evaluations(edit: str) -> str:
    return f"{edit.rstrip('/')}/evaluations"


def _work(
    plans: Sequence[Plan],
    folders: Sequence[RunFolder],
    opener: Opener,
    follow: Callable[[Progress], None],
    leases: Sequence[Lease],
) -> None:
    """Have every unit that is neither committed nor set aside measured, those of all edits that read the same together.

    (Units that read different data stay apart: there other samples may have the same identifiers.)
    """

    def check() -> None:
        for lease in leases:
            lease()

    units = Folders(folders, [len(plan.units) for plan in plans])
    first = plans[0].settings

    def actors(wanted: list[int]) -> Any:
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number in wanted:
            edit, place = units.place(number)
            unit = plans[edit].units[place]
            groups[unit.kind, unit.number].append(number)
        pool = pool_for(first.workers, first.gpus_per_worker, len(groups))
        arguments = plans, [folder.store.uri for folder in folders], opener
        return mapped_together(EvaluationWorker, arguments, list(groups.values()), pool, ahead=0)

    carry_out(
        units,
        [unit.samples for plan in plans for unit in plan.units],
        actors,
        follow,
        check,
        address=first.address,
        retry_failed=first.retry_failed,
    )


def _gathered(folder: RunFolder, receipts: dict[int, Receipt], plan: Plan) -> tuple[pa.Table, pa.Table]:
    """Return the measurements of all units, and the captions, each sample once.

    An image that the edit was made on and that the data holds counts as it is there, and not again as one of the run's.
    """

    def read(name: str, *, own: bool) -> pa.Table:
        some = {number: receipt for number, receipt in receipts.items() if (plan.units[number].kind == "own") == own}
        return folder.read_parts(some, name, EVALUATION_SCHEMAS[name])

    captions = read("captions", own=False)
    known = captions.filter(pc.equal(captions["role"], EDITED))["image"].unique()
    measured, captions = (
        pa.concat_tables([data, own.filter(pc.invert(pc.is_in(own["image"], known)))])
        for data, own in ((read(name, own=False), read(name, own=True)) for name in ("measurements", "captions"))
    )
    rows = {row["sample_id"]: row for row in reversed(captions.to_pylist())}
    kept = [rows[name] for name in sorted(rows)]
    return measured, pa.Table.from_pylist(kept, schema=EVALUATION_SCHEMAS["captions"])


def _write(outcome: Evaluation, plan: Plan, fingerprint: str, captions: pa.Table, lease: Lease) -> None:
    store = lease.guard(RunFolder.at(plan.settings.edit, patient=True).store)
    content = {
        "measures": outcome.measures,
        "cost": outcome.facts,
        "data": plan.settings.data,
        "run": plan.settings.run,
        "samples": outcome.samples,
        "failures": outcome.failures,
        "units_aside": outcome.quarantined,
        "settings": plan.settings.result_settings() | plan.settings.model_dump(include={"draws", "detector"}),
        "fingerprint": fingerprint,
        "seconds": round(outcome.seconds, 3),
    }
    store.put(CAPTIONS_FILE, to_bytes(captions))
    store.put(EVALUATION_FILE, json.dumps(content, indent=1, ensure_ascii=False, default=str).encode())
