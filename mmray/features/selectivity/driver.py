"""The driver of `mmray selectivity`: sums per label, selection with controls, tests on held-out samples, tables.

RUN/selectivity/FINGERPRINT/sums/    parts of the pass that neurons are chosen from
RUN/selectivity/FINGERPRINT/tests/   parts of the tests
RUN/selectivity/tested/              a marker per choice that was tested
RUN/snapshots/selectivity/, tables/  those of `TABLES`, with the rows of all analyses
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from mmray.engine import JobResult
from mmray.engine import run as run_job
from mmray.engine.driver import Follow
from mmray.errors import DamagedError, InputError
from mmray.features.selectivity.job import LabelJob, SumsJob, Tests, TestsJob
from mmray.features.selectivity.masks import Mask, joined, masks_of
from mmray.features.selectivity.plan import LabelPlan, plan_labels
from mmray.features.selectivity.reply_language import train_classifier
from mmray.features.selectivity.rows import (
    answer_rows,
    intervention_rows,
    label_rows,
    neuron_rows,
    stage_rows,
    steering_rows,
)
from mmray.features.selectivity.selection import QUANTITY, Totals, add_up, select, totals_of_activity
from mmray.features.selectivity.settings import TOGETHER, SelectivitySettings
from mmray.features.selectivity.steering import steer_of
from mmray.features.selectivity.tables import ANALYSIS, MODALITIES, TABLES
from mmray.models.options import MODULES
from mmray.neuron_names import PLAIN
from mmray.runs.card import publish
from mmray.runs.driver import drive_analysis, open_target
from mmray.runs.lease import Lease
from mmray.runs.run import Run, open_run
from mmray.runs.snapshots import Snapshot, SnapshotWriter, is_published, newest, next_fence
from mmray.runs.tables import read_table
from mmray.storage import Store

OF_HELD_OUT = ("interventions", "masked_answers", "stages", "steering")
"""Tables with measurements of the chosen neurons."""
CHOSEN = ["module", "label", "layer", "unit"]
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
        # One analysis per module.
        self.each = [settings.of(module) for module in _modules(run, settings.module)]
        self.tested = [f"{LabelJob.name}/tested/{each.choice()}" for each in self.each]
        # A choice that was tested stays blind to the held-out samples, or a later call would choose with the test set.
        self.plan = plan_labels(settings, run, hold_out=settings.tests or any(map(self.store.exists, self.tested)))
        self.quarantined: dict[int, str] = {}

    @property
    def analyses(self) -> list[dict[str, str]]:
        """The columns that distinguish the rows of this call: those of each module, and of all together."""
        together = [self.settings.analysis()] if self.settings.module == TOGETHER else []
        return [each.analysis() for each in self.each] + together

    def tables(self) -> dict[str, pa.Table]:
        """Return the rows of each table."""
        labels, settings, masks = self.plan.labels, self.settings, list[Mask]()
        neurons, summaries, steer = list[pa.Table](), list[pa.Table](), None
        for each in self.each:
            totals, shards = self._totals(each)
            selection = select(totals, each, each.permutations)
            names = self.run.names if each.module == "language" else PLAIN
            widths, analysis = _widths(self.run, each.module), each.analysis()
            neurons.append(neuron_rows(selection, labels, widths, names, analysis))
            summaries.append(label_rows(selection, labels, self.plan.selected_from(shards), widths, analysis))
            masks += masks_of(selection, labels, widths, settings.seed, each.module)
            if settings.steer:
                steer = steer_of(settings, selection, totals, labels)
        found = {"selectivity": pa.concat_tables(neurons), "selective_labels": pa.concat_tables(summaries)}
        if settings.tests:
            together = joined(masks) if settings.module == TOGETHER else []
            found |= self._tests(Tests((*masks, *together), steer))
            # Only after the tests: a call that died before has shown nobody the held-out samples.
            for marker in self.tested:
                self.store.put(marker, b"")
        return found

    def write(self, found: Mapping[str, pa.Table]) -> tuple[str, ...]:
        """Replace this analysis's rows in the run's tables, and return the tables whose rows became outdated.

        Rows of other analyses stay.
        """
        store, analyses = self.store, self.analyses
        before = newest(store, LabelJob.name)
        rows, rewritten = dict(found), set[str]()
        own: dict[str, pa.Table] = {}
        others: dict[str, pa.Table] = {}
        for name, schema in TABLES.items():
            try:
                present = _present(store, before, name)
            except DamagedError as error:
                logger.warning("%s; its rows of other analyses are lost: run those again, too", error)
                present = schema.empty_table()
                rewritten.add(name)
                rows.setdefault(name, present)
            own[name], others[name] = _split(present, analyses)
        outdated = []
        # Compared without scores, which rounding may change.
        if not own["selectivity"].select(CHOSEN).equals(found["selectivity"].select(CHOSEN)):
            # Measurements of other neurons say nothing about these, nor do those of all modules together.
            together = [{**analyses[0], "module": TOGETHER, "modality": modality} for modality in MODALITIES]
            for name in OF_HELD_OUT:
                joint, others[name] = _split(others[name], together)
                if len(joint) or (len(own[name]) and name not in found):
                    outdated.append(name)
                    rewritten.add(name)
                    rows.setdefault(name, own[name].slice(0, 0))
        changed = [name for name, table in rows.items() if name in rewritten or not table.equals(own[name])]
        made_from = dict(before.made_from if before else {})
        # Status compares these with the run, to say which analyses are out of date.
        made_from |= {" ".join(analysis.values()): self.run.digests()["receipts"] for analysis in analyses}
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
        return tuple(outdated)

    def _totals(self, settings: SelectivitySettings) -> tuple[dict[str, Totals], list[int]]:
        """Return the totals of a module over the samples that the selection sees, and the shards they come from."""
        plan = replace(self.plan, settings=settings)
        if _census_suffices(plan):
            totals, shards = _census_totals(self.run, plan), plan.shards
        else:
            done = self._run(SumsJob(plan))
            totals = add_up(done.parts.each("sums"), plan.labels)
            shards = [plan.shards[unit] for unit in done.parts.receipts]
        if not totals or not totals[QUANTITY[settings.method]].tokens[0].any():
            raise InputError(_nothing_counted(self.run, self.quarantined))
        return totals, shards

    def _tests(self, tests: Tests) -> dict[str, pa.Table]:
        """Return the rows of the requested tests."""
        plan, settings, steer = self.plan, self.settings, tests.steer
        analyses = {analysis["module"]: analysis for analysis in self.analyses}
        parts = self._run(TestsJob(plan, tests)).parts
        tables = {}
        if settings.interventions:
            measured = parts.each("measurements")
            tables["interventions"] = intervention_rows(measured, tests.masks, plan.images, settings, analyses)
            tables["masked_answers"] = answer_rows(parts.each("answers"), analyses)
        if settings.stages:
            tables["stages"] = stage_rows(parts.each("lens"), analyses)
        if steer is not None:
            analysis = settings.analysis()
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
    # The census counts activity of all its samples, without replicates or prompts, and never contributions. Of the
    # other modules it counts one at most.
    counted = settings.module in ("language", plan.census.module) and settings.modality != "all"
    return settings.method == "lape" and counted and not (controls or settings.samples or settings.balance)


def _census_totals(run: Run, plan: LabelPlan) -> dict[str, Totals]:
    rows = run.table("activity")
    settings = plan.settings
    rows = rows.filter(pc.and_(pc.equal(rows["label_kind"], settings.by), pc.equal(rows["module"], settings.module)))
    return totals_of_activity(rows, plan.labels, settings.modality, sum(_widths(run, settings.module)))


def _nothing_counted(run: Run, quarantined: Mapping[int, str]) -> str:
    for shard, reason in quarantined.items():
        return (
            f"{run.uri}: nothing was counted; shard {shard} was quarantined: {reason} (--retry-failed tries it again)"
        )
    return f"{run.uri}: no token of this kind was counted; see --module and --count"


def _modules(run: Run, module: str) -> list[str]:
    """Return the modules to choose neurons of; those that the run's model has, for all."""
    return [module] if module != TOGETHER else [name for name in MODULES if _widths_or_none(run, name)]


def _widths(run: Run, module: str) -> list[int]:
    widths = _widths_or_none(run, module)
    if not widths:
        raise InputError(f"{run.info['model']['name']}: --module {module}: it has no MLP; see mmray check-model")
    return widths


def _widths_or_none(run: Run, module: str) -> list[int]:
    model = run.info["model"]
    widths: list[int] = model["widths"] if module == "language" else model.get("module_widths", {}).get(module, [])
    return widths


def _present(store: Store, snapshot: Snapshot | None, name: str) -> pa.Table:
    """Return the rows of all analyses in one of the run's tables; raises DamagedError if it can't be read."""
    if snapshot is not None and name in snapshot.tables:
        return snapshot.read(store, name)
    try:
        return read_table(store, name)
    except FileNotFoundError:
        return TABLES[name].empty_table()


def _split(table: pa.Table, analyses: Iterable[Mapping[str, str]]) -> tuple[pa.Table, pa.Table]:
    """Return the rows of these analyses, and those of others."""
    names = [column.name for column in ANALYSIS]
    each = [reduce(pc.and_, [pc.equal(table[name], one[name]) for name in names]) for one in analyses]
    own = reduce(pc.or_, each)
    return table.filter(own), table.filter(pc.invert(own))
