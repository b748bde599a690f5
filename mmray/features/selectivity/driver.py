"""The driver of `mmray selectivity`: sums per label, selection with controls, tests on held-out samples, tables.

RUN/selectivity/FINGERPRINT/sums/    parts of the pass that neurons are chosen from
RUN/selectivity/FINGERPRINT/tests/   parts of the tests
RUN/selectivity/tested/              a marker per choice that was tested
RUN/snapshots/selectivity/, tables/  selectivity, selective_labels, interventions, steering, stages, for all analyses
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
from mmray.features.selectivity.job import LabelJob, SumsJob, Tests, TestsJob
from mmray.features.selectivity.masks import masks_of
from mmray.features.selectivity.plan import LabelPlan, plan_labels
from mmray.features.selectivity.reply_language import train_classifier
from mmray.features.selectivity.rows import intervention_rows, label_rows, neuron_rows, stage_rows, steering_rows
from mmray.features.selectivity.selection import QUANTITY, LabelSelection, Totals, add_up, select, totals_of_activity
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.features.selectivity.steering import steer_of
from mmray.features.selectivity.tables import ANALYSIS, TABLES
from mmray.neuron_names import PLAIN
from mmray.runs.card import publish
from mmray.runs.driver import drive_analysis, open_target
from mmray.runs.lease import Lease
from mmray.runs.run import Run, open_run
from mmray.runs.snapshots import Snapshot, SnapshotWriter, is_published, newest, next_fence
from mmray.runs.tables import read_table
from mmray.storage import Store

OF_HELD_OUT = ("interventions", "stages", "steering")
"""Tables with measurements of the chosen neurons."""
CHOSEN = ["label", "layer", "unit"]
"""Columns of `selectivity` that identify the chosen neurons."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectivityResult:
    """A finished analysis: the rows it wrote, by table, and quarantined shards."""

    tables: dict[str, pa.Table]
    quarantined: dict[int, str]
    """Shard → why it was quarantined."""
    seconds: float
    outdated: tuple[str, ...]
    """Tables whose rows were removed, because an earlier call measured them for other neurons."""


def run_selectivity(settings: SelectivitySettings, follow: Follow = lambda _: None) -> SelectivityResult:
    """Choose each label's neurons, and run the requested tests. Work that an earlier call did is not repeated.

    Earlier tests stay in the tables while the same neurons are chosen. Once a choice has been tested, it always leaves
    out the held-out samples, so that a call without tests does not change it.

    Calls `follow` after every committed shard. Raises InputError for anything wrong with the set-up, or if another call
    is working on the run.
    """
    began = time.perf_counter()
    run = open_run(settings.run)
    with drive_analysis(f"{run.uri}/{LabelJob.name}") as lease:
        analysis = _Analysis(settings, run, follow, lease)
        found = analysis.tables()
        outdated = analysis.write(found)
    return SelectivityResult(found, analysis.quarantined, time.perf_counter() - began, outdated)


class _Analysis:
    """One analysis of a run: its passes over the samples, and the rows made from them."""

    def __init__(self, settings: SelectivitySettings, run: Run, follow: Follow, lease: Lease) -> None:
        self.settings = settings
        self.run = run
        self.follow = follow
        self.lease = lease
        self.store = lease.guard(open_target(run.uri))
        self.fence = next_fence(self.store, LabelJob.name, lease.number)
        self.tested = f"{LabelJob.name}/tested/{settings.choice()}"
        # A choice that was tested stays blind to the held-out samples, or a later call would choose with the test set.
        self.plan = plan_labels(settings, run, hold_out=settings.tests or self.store.exists(self.tested))
        self.widths = _widths(run, settings.module)
        self.quarantined: dict[int, str] = {}

    def tables(self) -> dict[str, pa.Table]:
        """Return the rows of each table."""
        plan, settings, analysis = self.plan, self.settings, self.settings.analysis()
        totals, shards = (_census_totals(self.run, plan), plan.shards) if _census_suffices(plan) else self._sums()
        if not totals or not totals[QUANTITY[settings.method]].tokens[0].any():
            raise InputError(_nothing_counted(self.run, self.quarantined))
        selection = select(totals, settings, settings.permutations)
        names = self.run.names if settings.module == "language" else PLAIN
        found = {
            "selectivity": neuron_rows(selection, plan.labels, self.widths, names, analysis),
            "selective_labels": label_rows(selection, plan.labels, plan.selected_from(shards), self.widths, analysis),
        }
        if settings.tests:
            found |= self._tests(totals, selection)
            # Only after the tests: a call that died before has shown nobody the held-out samples.
            self.store.put(self.tested, b"")
        return found

    def write(self, found: Mapping[str, pa.Table]) -> tuple[str, ...]:
        """Replace this analysis's rows in the run's tables, and return the tables whose rows became outdated.

        Rows of other analyses stay.
        """
        store, analysis = self.store, self.settings.analysis()
        before = newest(store, LabelJob.name)
        rows, damaged = dict(found), set()
        own: dict[str, pa.Table] = {}
        others: dict[str, pa.Table] = {}
        for name, schema in TABLES.items():
            try:
                present = _present(store, before, name)
            except DamagedError as error:
                logger.warning("%s; its rows of other analyses are lost: run those again, too", error)
                present = schema.empty_table()
                damaged.add(name)
                rows.setdefault(name, present)
            own[name], others[name] = _split(present, analysis)
        outdated: tuple[str, ...] = ()
        # Compared without scores, which rounding may change.
        if not own["selectivity"].select(CHOSEN).equals(found["selectivity"].select(CHOSEN)):
            # Measurements of other neurons say nothing about these.
            outdated = tuple(name for name in OF_HELD_OUT if len(own[name]) and name not in found)
            rows |= {name: own[name].slice(0, 0) for name in outdated}
        changed = [name for name, table in rows.items() if name in damaged or not table.equals(own[name])]
        made_from = dict(before.made_from if before else {})
        # Status compares these with the run, to say which analyses are out of date.
        made_from |= {" ".join(analysis.values()): self.run.digests()["receipts"]}
        if changed or (before is not None and before.made_from != made_from):
            writer = SnapshotWriter(store, LabelJob.name, self.fence)
            for name in changed:
                # The empty table comes first because rows of an earlier version may lack a newer column.
                for part in (TABLES[name].empty_table(), others[name], rows[name]):
                    writer.add(name, part)
            publish(store, writer.commit(made_from, {name: len(table) for name, table in found.items()}))
        # An earlier call committed this snapshot and died before it became visible.
        elif before is not None and not is_published(store, before):
            publish(store, before)
        return outdated

    def _sums(self) -> tuple[dict[str, Totals], list[int]]:
        """Return the totals over the samples that the selection sees, and the shards they come from."""
        done = self._run(SumsJob(self.plan))
        totals = add_up(done.parts.each("sums"), self.plan.labels)
        return totals, [self.plan.shards[unit] for unit in done.parts.receipts]

    def _tests(self, totals: dict[str, Totals], selection: LabelSelection) -> dict[str, pa.Table]:
        """Return the rows of the requested tests."""
        plan, settings, analysis = self.plan, self.settings, self.settings.analysis()
        masks = tuple(masks_of(selection, plan.labels, self.widths, settings.seed))
        steer = steer_of(settings, selection, totals, plan.labels) if settings.steer else None
        parts = self._run(TestsJob(plan, Tests(masks, steer))).parts
        tables = {}
        if settings.interventions:
            tables["interventions"] = intervention_rows(parts.each("measurements"), masks, plan.images, analysis)
        if settings.stages:
            tables["stages"] = stage_rows(parts.each("lens"), analysis)
        if steer is not None:
            texts = ((plan.labelled[name], text) for shard in plan.captions.values() for name, text in shard.items())
            classifier = train_classifier(texts)
            tables["steering"] = steering_rows(parts.each("replies"), steer, settings, classifier, analysis)
        return tables

    def _run(self, job: SumsJob | TestsJob) -> JobResult:
        done = run_job(job, follow=self.follow, lease=self.lease)
        self.quarantined |= {self.plan.shards[unit]: reason for unit, reason in done.quarantined.items()}
        return done


def _census_suffices(plan: LabelPlan) -> bool:
    """Return whether the census's table `activity` has all that is needed, so that no pass over samples is needed."""
    settings = plan.settings
    controls = settings.permutations or settings.bootstraps or plan.held_out
    # The census counts activity of all its samples, without replicates, and never contributions.
    return settings.method == "lape" and not (controls or settings.samples or settings.balance)


def _census_totals(run: Run, plan: LabelPlan) -> dict[str, Totals]:
    rows = run.table("activity")
    settings = plan.settings
    rows = rows.filter(pc.and_(pc.equal(rows["label_kind"], settings.by), pc.equal(rows["module"], settings.module)))
    return totals_of_activity(rows, plan.labels, settings.counted_modality, sum(_widths(run, settings.module)))


def _nothing_counted(run: Run, quarantined: Mapping[int, str]) -> str:
    for shard, reason in quarantined.items():
        return (
            f"{run.uri}: nothing was counted; shard {shard} was quarantined: {reason} (--retry-failed tries it again)"
        )
    return f"{run.uri}: no token of this kind was counted; see the census's --module, and --modality"


def _widths(run: Run, module: str) -> list[int]:
    model = run.info["model"]
    widths: list[int] = model["widths"] if module == "language" else model.get("module_widths", {}).get(module, [])
    if not widths:
        raise InputError(f"{model['name']}: --module {module}: it has no MLP; see mmray check-model")
    return widths


def _present(store: Store, snapshot: Snapshot | None, name: str) -> pa.Table:
    """Return the rows of all analyses in one of the run's tables; raises DamagedError if it can't be read."""
    if snapshot is not None and name in snapshot.tables:
        return snapshot.read(store, name)
    try:
        return read_table(store, name)
    except FileNotFoundError:
        return TABLES[name].empty_table()


def _split(table: pa.Table, analysis: Mapping[str, str]) -> tuple[pa.Table, pa.Table]:
    """Return the rows of this analysis, and those of others."""
    own = reduce(pc.and_, [pc.equal(table[field.name], analysis[field.name]) for field in ANALYSIS])
    return table.filter(own), table.filter(pc.invert(own))
