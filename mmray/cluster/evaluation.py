"""The driver of an evaluation: settle the units of work, hand them to actors, sum up their rows, write the result.

EDIT/evaluations/FINGERPRINT/     the rows of each unit, committed once, as a run's shards are (`mmray.runs`)
EDIT/evaluation.json              the measures of the last evaluation that ended
EDIT/captions.parquet             its captions before and after
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.census import Progress
from mmray.cluster.described import described
from mmray.cluster.evaluation_plan import Plan, digests, plan_evaluation, units_json
from mmray.cluster.evaluation_worker import EvaluationWorker, Opener
from mmray.cluster.finished import Finished
from mmray.cluster.units import mapped
from mmray.editing.edit import open_edit
from mmray.evaluation.settings import EvaluationSettings
from mmray.evaluation.summary import summarise
from mmray.results.run import Run, open_run
from mmray.runs import Receipt, RunFolder
from mmray.storage import open_store
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

    `follow` hears of every committed unit. Raises InputError for anything wrong with the set-up, before any work.
    """
    began = time.perf_counter()
    run, edit = open_run(settings.run), opener(settings.edit)
    plan = plan_evaluation(settings, run, edit.purposes)
    folder, info = _folder(plan, run)
    folder.begin(info, units_json(plan))
    _work(plan, folder, opener, follow)
    receipts = folder.receipts()
    measured, captions = _gathered(folder, receipts)
    outcome = Evaluation(
        edit=settings.edit,
        measures=summarise(measured, plan.settings),
        facts=edit.facts,
        samples=sum(receipt.samples for receipt in receipts.values()),
        failures=sum(receipt.failures for receipt in receipts.values()),
        shards_aside=folder.reasons(receipts),
        seconds=time.perf_counter() - began,
    )
    _write(outcome, plan, info["fingerprint"], captions)
    folder.finish({"samples": outcome.samples, "failures": outcome.failures})
    return outcome


def _folder(plan: Plan, run: Run) -> tuple[RunFolder, dict[str, Any]]:
    """Return where the rows of this evaluation lie, and what it says of itself."""
    info = described(plan.settings, digests(plan, run))
    return RunFolder(open_store(f"{plan.settings.edit.rstrip('/')}/evaluations/{info['fingerprint']}")), info


def _work(plan: Plan, folder: RunFolder, opener: Opener, follow: Callable[[Progress], None]) -> None:
    """Have every unit that is neither committed nor set aside measured."""
    carry_out(
        folder,
        [unit.samples for unit in plan.units],
        lambda units: _actors(plan, folder, opener, units),
        follow,
        address=plan.settings.address,
        retry_failed=plan.settings.retry_failed,
    )


def _actors(plan: Plan, folder: RunFolder, opener: Opener, units: list[int]) -> Any:
    pool = pool_for(plan.settings.workers, plan.settings.gpus_per_worker, len(units))
    return mapped(EvaluationWorker, (plan, folder.store.uri, opener), units, pool, ahead=0)


def _gathered(folder: RunFolder, receipts: dict[int, Receipt]) -> tuple[pa.Table, pa.Table]:
    """Return the measurements of all units, and the captions, each sample once."""
    parts = {name: folder.read_parts(receipts, name, EVALUATION_SCHEMAS[name]) for name in ("measurements", "captions")}
    rows = {row["sample_id"]: row for row in reversed(parts["captions"].to_pylist())}
    captions = [rows[name] for name in sorted(rows)]
    return parts["measurements"], pa.Table.from_pylist(captions, schema=EVALUATION_SCHEMAS["captions"])


def _write(outcome: Evaluation, plan: Plan, fingerprint: str, captions: pa.Table) -> None:
    store = open_store(plan.settings.edit)
    content = {
        "measures": outcome.measures,
        "cost": outcome.facts,
        "data": plan.settings.data,
        "run": plan.settings.run,
        "samples": outcome.samples,
        "failures": outcome.failures,
        "units_aside": outcome.shards_aside,
        "settings": plan.settings.result_settings(),
        "fingerprint": fingerprint,
        "seconds": round(outcome.seconds, 3),
    }
    store.put(CAPTIONS_FILE, to_bytes(captions))
    store.put(EVALUATION_FILE, json.dumps(content, indent=1, ensure_ascii=False, default=str).encode())
