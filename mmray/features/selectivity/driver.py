"""The driver of `mmray selectivity`: sums by label, selection and its controls, tests on held-out samples, tables.

RUN/selectivity/FINGERPRINT/sums/    what each shard committed of the pass that neurons are chosen from
RUN/selectivity/FINGERPRINT/tests/   what each shard committed of the tests
RUN/selectivity/tested/              a mark of each choice that was tested
RUN/snapshots/selectivity/, tables/  selectivity, selective_labels, interventions, steering, stages, of all analyses
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from mmray.engine import JobResult
from mmray.engine import run as run_job
from mmray.engine.driver import Follow
from mmray.errors import DamagedError, InputError
from mmray.features.selectivity.choices import label_rows, neuron_rows
from mmray.features.selectivity.job import LabelJob, SumsJob, Tests, TestsJob
from mmray.features.selectivity.masks import masks_of
from mmray.features.selectivity.measures import intervention_rows, stage_rows, steering_rows
from mmray.features.selectivity.plan import LabelPlan, plan_labels
from mmray.features.selectivity.reply_language import recogniser
from mmray.features.selectivity.selection import QUANTITY, LabelSelection, Totals, add_up, of_activity, select
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.steering import steer_of
from mmray.features.selectivity.tables import ANALYSIS, TABLES
from mmray.runs.driver import drive_analysis, open_target
from mmray.runs.lease import Lease
from mmray.runs.run import Run, open_run
from mmray.runs.snapshots import Snapshot, SnapshotWriter, is_published, newest, next_fence, publish
from mmray.runs.tables import read_table
from mmray.storage import Store

OF_HELD_OUT = ("interventions", "stages", "steering")
"""Tables of what was measured of the chosen neurons."""
CHOSEN = ["label", "layer", "unit"]
"""Columns of `selectivity` that say which neurons were chosen."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectivityResult:
    """A finished analysis: the rows that it wrote, by table, and what could not be done."""

    tables: dict[str, pa.Table]
    quarantined: dict[int, str]
    """Shard → why it was given up."""
    seconds: float
    outdated: tuple[str, ...]
    """Tables whose rows an earlier call measured of other neurons, and that have none of this analysis now."""


def run_selectivity(settings: SelectivitySettings, follow: Follow = lambda _: None) -> SelectivityResult:
    """Choose each label's neurons and test them as asked; what was done by an earlier call is not done again.

    Tests of an earlier call stay in the tables while the same neurons are chosen; a choice that was tested once is made
    without the held-out samples ever after, so that looking at it again changes nothing. `follow` is told of every
    committed shard. Raises InputError for anything wrong with the set-up, or where another call is at work on the run.
    """
    began = time.perf_counter()
    run = open_run(settings.run)
    with drive_analysis(f"{run.uri}/{LabelJob.name}") as lease:
        analysis = _Analysis(settings, run, follow, lease)
        found = analysis.tables()
        outdated = analysis.write(found)
    return SelectivityResult(found, analysis.quarantined, time.perf_counter() - began, outdated)


class _Analysis:
    """One analysis of a run: its passes over the samples, and the rows that come of them."""

    def __init__(self, settings: SelectivitySettings, run: Run, follow: Follow, lease: Lease) -> None:
        self.settings = settings
        self.run = run
        self.follow = follow
        self.lease = lease
        self.store = lease.guard(open_target(run.uri))
        self.fence = next_fence(self.store, LabelJob.name, lease.number)
        self.tested = f"{LabelJob.name}/tested/{settings.choice()}"
        self.plan = plan_labels(settings, run, hold_out=settings.tests or self.store.exists(self.tested))
        self.widths = _widths(run, settings.module)
        self.quarantined: dict[int, str] = {}

    def tables(self) -> dict[str, pa.Table]:
        """Return the rows of each table."""
        plan, settings, facts = self.plan, self.settings, self.settings.facts()
        totals, shards = (_counted(self.run, plan), plan.shards) if _is_counted(plan) else self._sums()
        if not totals or not totals[QUANTITY[settings.method]].tokens[0].any():
            raise InputError(_nothing(self.run, self.quarantined))
        selection = select(totals, settings, settings.permutations)
        found = {
            "selectivity": neuron_rows(selection, plan.labels, self.widths, facts),
            "selective_labels": label_rows(selection, plan.labels, plan.selected_from(shards), self.widths, facts),
        }
        if settings.tests:
            found |= self._tests(totals, selection)
            self.store.put(self.tested, b"")
        return found

    def write(self, found: Mapping[str, pa.Table]) -> tuple[str, ...]:
        """Put an analysis's rows in the run's tables, in place of its earlier ones.

        Return the tables whose rows were measured of other neurons and are gone, with none in their place.
        """
        store, facts = self.store, self.settings.facts()
        before = newest(store, LabelJob.name)
        rows, damaged = dict(found), set()
        own: dict[str, pa.Table] = {}
        others: dict[str, pa.Table] = {}
        for name, schema in TABLES.items():
            try:
                present = _present(store, before, name)
            except DamagedError as error:
                logger.warning("%s; what other analyses have put there is gone: run those again, too", error)
                present = schema.empty_table()
                damaged.add(name)
                rows.setdefault(name, present)
            own[name], others[name] = _split(present, facts)
        outdated: tuple[str, ...] = ()
        if not own["selectivity"].select(CHOSEN).equals(found["selectivity"].select(CHOSEN)):
            # What was measured of other neurons is not true of these.
            outdated = tuple(name for name in OF_HELD_OUT if len(own[name]) and name not in found)
            rows |= {name: own[name].slice(0, 0) for name in outdated}
        changed = [name for name, table in rows.items() if name in damaged or not table.equals(own[name])]
        made_from = dict(before.made_from if before else {})
        made_from |= {" ".join(facts.values()): self.run.digests()["receipts"]}
        if changed or (before is not None and before.made_from != made_from):
            writer = SnapshotWriter(store, LabelJob.name, self.fence)
            for name in changed:
                # Rows of an earlier version may lack a column that has come since.
                for part in (TABLES[name].empty_table(), others[name], rows[name]):
                    writer.add(name, part)
            publish(store, writer.commit(made_from, {name: len(table) for name, table in found.items()}))
        elif before is not None and not is_published(store, before):
            publish(store, before)
        return outdated

    def _sums(self) -> tuple[dict[str, Totals], list[int]]:
        """Return what the samples that are selected from add up to, and the shards that they are of."""
        done = self._run(SumsJob(self.plan))
        totals = add_up(done.parts.each("sums"), self.plan.labels)
        return totals, [self.plan.shards[unit] for unit in done.parts.receipts]

    def _tests(self, totals: dict[str, Totals], selection: LabelSelection) -> dict[str, pa.Table]:
        """Return the rows of the tests that were asked for."""
        plan, settings, facts = self.plan, self.settings, self.settings.facts()
        masks = tuple(masks_of(selection, plan.labels, self.widths, settings.seed))
        steer = steer_of(settings, selection, totals, plan.labels) if settings.steer else None
        parts = self._run(TestsJob(plan, Tests(masks, steer))).parts
        tables = {}
        if settings.interventions:
            tables["interventions"] = intervention_rows(parts.each("measurements"), masks, plan.images, facts)
        if settings.stages:
            tables["stages"] = stage_rows(parts.each("lens"), facts)
        if steer is not None:
            texts = ((plan.labelled[name], text) for some in plan.captions.values() for name, text in some.items())
            tables["steering"] = steering_rows(parts.each("replies"), steer, settings, recogniser(texts), facts)
        return tables

    def _run(self, job: SumsJob | TestsJob) -> JobResult:
        done = run_job(job, follow=self.follow, lease=self.lease)
        self.quarantined |= {self.plan.shards[unit]: reason for unit, reason in done.quarantined.items()}
        return done


def _is_counted(plan: LabelPlan) -> bool:
    """Return whether the census's own table has all that is needed, so that no sample need be looked at again."""
    settings = plan.settings
    controls = settings.permutations or settings.bootstraps or plan.held_out
    return settings.method == "lape" and not (controls or settings.samples or settings.balance)


def _counted(run: Run, plan: LabelPlan) -> dict[str, Totals]:
    rows = run.table("activity")
    settings = plan.settings
    rows = rows.filter(pc.and_(pc.equal(rows["label_kind"], settings.by), pc.equal(rows["module"], settings.module)))
    return of_activity(rows, plan.labels, settings.looked_at, sum(_widths(run, settings.module)))


def _nothing(run: Run, aside: Mapping[int, str]) -> str:
    for shard, reason in aside.items():
        return (
            f"{run.uri}: nothing was counted; shard {shard} was quarantined: {reason} (--retry-failed tries it again)"
        )
    return f"{run.uri}: no token of this kind was counted; see the census's --module, and --modality"


def _widths(run: Run, module: str) -> list[int]:
    model = run.info["model"]
    widths: list[int] = model["widths"] if module == "language" else model.get("module_widths", {}).get(module, [])
    if not widths:
        raise InputError(f"{model['name']}: --module {module}: there is no MLP in it; see mmray check-model")
    return widths


def _present(store: Store, snapshot: Snapshot | None, name: str) -> pa.Table:
    """Return the rows of all analyses in one of the run's tables; raises DamagedError for one that can't be read."""
    if snapshot is not None and name in snapshot.tables:
        return snapshot.read(store, name)
    try:
        return read_table(store, name)
    except FileNotFoundError:
        return TABLES[name].empty_table()


def _split(table: pa.Table, facts: Mapping[str, str]) -> tuple[pa.Table, pa.Table]:
    """Return the rows of an analysis, and those of others."""
    own = reduce(pc.and_, [pc.equal(table[field.name], facts[field.name]) for field in ANALYSIS])
    return table.filter(own), table.filter(pc.invert(own))
