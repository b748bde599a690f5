"""The driver of `mmray selectivity`: sums by label, selection and its controls, tests on held-out samples, tables.

RUN/selectivity/FINGERPRINT/sums/    what each shard committed of the pass that neurons are chosen from
RUN/selectivity/FINGERPRINT/tests/   what each shard committed of the tests
RUN/selectivity/tested/              a mark of each choice that was tested
RUN/tables/                          selectivity, selective_labels, interventions, steering, stages
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.labels_plan import Plan, plan_labels
from mmray.cluster.labels_worker import LabelWorker, SumsWorker, Tests, TestsWorker
from mmray.cluster.units import mapped
from mmray.engine import Progress
from mmray.errors import DamagedError, InputError
from mmray.evaluation.labels import intervention_rows, stage_rows, steering_rows
from mmray.label_tables import ANALYSIS, LABEL_SCHEMAS
from mmray.neurons.labels.choices import label_rows, neuron_rows
from mmray.neurons.labels.masks import masks_of
from mmray.neurons.labels.recognising import recogniser
from mmray.neurons.labels.selecting import QUANTITY, Selection, Totals, add_up, of_activity, select
from mmray.neurons.labels.settings import SelectivitySettings
from mmray.neurons.labels.steering import steer_of
from mmray.results.run import Run, open_run
from mmray.runs import RunFolder
from mmray.runs.driver import drive_analysis
from mmray.runs.lease import Lease
from mmray.storage import Store
from mmray.tables import read_table
from mmray.version import VERSION
from mmray.writing import write_table

OF_HELD_OUT = ("interventions", "stages", "steering")
"""Tables of what was measured of the chosen neurons."""

OF_TESTS = ("run", "interventions", "questions", "stages")
"""Settings that the choice of neurons does not depend on, besides those of steering."""
OF_CONTROLS = ("permutations", "bootstraps")
"""Settings that change nothing but what is said beside the choice."""
OF_CHOICE = ("rate", "bar")
"""Settings that the sums by label don't depend on, though the choice does."""

Follow = Callable[[Progress], None]


@dataclass(frozen=True)
class Outcome:
    """A finished analysis: the rows that it wrote, by table, and what could not be done."""

    tables: dict[str, pa.Table]
    quarantined: dict[int, str]
    seconds: float
    outdated: tuple[str, ...]
    """Tables whose rows an earlier call measured of other neurons, and that have none of this analysis now."""


def run_selectivity(settings: SelectivitySettings, follow: Follow = lambda _: None) -> Outcome:
    """Choose each label's neurons and test them as asked; what was done by an earlier call is not done again.

    Tests of an earlier call stay in the tables while the same neurons are chosen; a choice that was tested once is made
    without the held-out samples ever after, so that looking at it again changes nothing. `follow` hears of every
    committed shard. Raises InputError for anything wrong with the set-up, or where another call is at work on the run.
    """
    began = time.perf_counter()
    run = open_run(settings.run, patient=True)
    with drive_analysis(f"{run.uri}/selectivity") as lease:
        found, aside, outdated = _found(settings, run, follow, lease)
    return Outcome(found, aside, time.perf_counter() - began, outdated)


def _found(
    settings: SelectivitySettings, run: Run, follow: Follow, lease: Lease
) -> tuple[dict[str, pa.Table], dict[int, str], tuple[str, ...]]:
    """Do the work and write the tables; return the rows of each, the shards set aside, and the tables outdated."""
    store, facts = lease.guard(run.folder.store), settings.facts()
    tested = f"selectivity/tested/{SelectivitySettings(run=run.uri, **_kept(settings, *OF_CONTROLS)).fingerprint()}"
    plan = plan_labels(settings, run, hold_out=settings.tests or store.exists(tested))
    widths = _widths(run, settings.module)
    work = _Work(plan, run, follow, lease)
    totals, shards = (_counted(run, plan), plan.shards) if _is_counted(plan) else work.sums()
    if not totals or not totals[QUANTITY[settings.method]].tokens[0].any():
        raise InputError(_nothing(run, work.aside))
    selection = select(totals, settings, settings.permutations)
    found = {
        "selectivity": neuron_rows(selection, plan.labels, widths, facts),
        "selective_labels": label_rows(selection, plan.labels, plan.selected_from(shards), widths, facts),
    }
    if settings.tests:
        found |= work.tests(totals, selection, widths)
        store.put(tested, b"")
    # What was measured of other neurons is not true of these.
    same = _is_chosen(store, found["selectivity"], facts)
    outdated = [name for name in OF_HELD_OUT if not same and len(_split(store, name, facts)[0])]
    for name in outdated:
        _write(store, name, LABEL_SCHEMAS[name].empty_table(), facts)
    for name, rows in found.items():
        _write(store, name, rows, facts)
    return found, work.aside, tuple(name for name in outdated if name not in found)


def _kept(settings: SelectivitySettings, *without: str) -> dict[str, Any]:
    """Return what the choice of neurons depends on, without some of it."""
    left_out = (*OF_TESTS, *without)
    known = settings.model_dump()
    return {name: value for name, value in known.items() if name not in left_out and "steer" not in name}


def _is_counted(plan: Plan) -> bool:
    """Tell whether the census's own table has all that is needed, so that no sample need be looked at again."""
    settings = plan.settings
    controls = settings.permutations or settings.bootstraps or plan.held_out
    return settings.method == "lape" and not (controls or settings.samples or settings.balance)


def _counted(run: Run, plan: Plan) -> dict[str, Totals]:
    rows = run.table("activity")
    settings = plan.settings
    rows = rows.filter(pc.and_(pc.equal(rows["label_kind"], settings.by), pc.equal(rows["module"], settings.module)))
    return of_activity(rows, plan.labels, settings.looked_at, sum(_widths(run, settings.module)))


def _nothing(run: Run, aside: Mapping[int, str]) -> str:
    for shard, reason in aside.items():
        return f"{run.uri}: nothing was counted; shard {shard} was set aside: {reason} (--retry-failed tries it again)"
    return f"{run.uri}: no token of this kind was counted; see the census's --module, and --modality"


def _widths(run: Run, module: str) -> list[int]:
    model = run.info["model"]
    widths: list[int] = model["widths"] if module == "language" else model.get("module_widths", {}).get(module, [])
    if not widths:
        raise InputError(f"{model['name']}: --module {module}: there is no MLP in it; see mmray check-model")
    return widths


class _Work:
    """The two passes over the run's samples."""

    def __init__(self, plan: Plan, run: Run, follow: Follow, lease: Lease) -> None:
        self.plan = plan
        self.run = run
        self.follow = follow
        self.lease = lease
        self.aside: dict[int, str] = {}

    def sums(self) -> tuple[dict[str, Totals], list[int]]:
        """Return what the samples that are selected from add up to, and the shards that they are of."""
        # Which tests follow changes nothing but the samples that are held out for them, and those the plan knows.
        settings = _kept(self.plan.settings, *OF_CHOICE)
        folder = self._folder("sums", settings, course=str(self.plan.settings.steer is not None))
        self._carry_out(folder, SumsWorker, ())
        totals = add_up(self._parts(folder, "sums"), self.plan.labels)
        return totals, [self.plan.shards[unit] for unit in folder.receipts()]

    def tests(self, totals: dict[str, Totals], selection: Selection, widths: Sequence[int]) -> dict[str, pa.Table]:
        """Return the rows of the tests that were asked for."""
        plan, settings = self.plan, self.plan.settings
        masks = tuple(masks_of(selection, plan.labels, widths, settings.seed))
        steer = steer_of(settings, selection, totals, plan.labels) if settings.steer else None
        folder = self._folder("tests", settings.model_dump())
        self._carry_out(folder, TestsWorker, (Tests(masks, steer),))
        facts, tables = settings.facts(), {}
        if settings.interventions:
            tables["interventions"] = intervention_rows(self._parts(folder, "measurements"), masks, plan.images, facts)
        if settings.stages:
            tables["stages"] = stage_rows(self._parts(folder, "lens"), facts)
        if steer is not None:
            texts = ((plan.labelled[name], text) for some in plan.captions.values() for name, text in some.items())
            replies = self._parts(folder, "replies")
            tables["steering"] = steering_rows(replies, steer, settings, recogniser(texts), facts)
        return tables

    def _folder(self, name: str, settings: dict[str, Any], **digests: str) -> RunFolder:
        digests |= {"model": self.run.info["digests"]["model"], "samples": self.plan.digest()}
        known = SelectivitySettings(**{"run": self.run.uri, **settings})
        fingerprint = known.fingerprint(**digests)
        info = {
            "settings": known.model_dump(exclude={"address"}),
            "result_settings": known.model_dump(exclude={"run"}),
            "digests": digests,
            "fingerprint": fingerprint,
            "shards": len(self.plan.shards),
            "versions": {"mmray": VERSION},
        }
        folder = RunFolder.at(f"{self.run.uri}/selectivity/{fingerprint}/{name}", patient=True)
        folder.begin(info, json.dumps(self.plan.shards).encode())
        return folder

    def _carry_out(self, folder: RunFolder, worker: type[LabelWorker], more: tuple[object, ...]) -> None:
        plan = self.plan
        sizes = [len(plan.captions[shard]) for shard in plan.shards]
        arguments = (plan, *more, folder.store.uri)
        carry_out(
            folder,
            sizes,
            lambda units: _actors(worker, arguments, plan.settings, units),
            self.follow,
            self.lease,
            address=plan.settings.address,
            retry_failed=plan.settings.retry_failed,
        )
        reasons = folder.reasons(folder.receipts())
        self.aside |= {plan.shards[unit]: reason for unit, reason in reasons.items()}

    def _parts(self, folder: RunFolder, name: str) -> Iterator[pa.Table]:
        for receipt in folder.receipts().values():
            yield folder.read_part(receipt, name)


def _actors(
    worker: type[LabelWorker], arguments: tuple[Any, ...], settings: SelectivitySettings, units: list[int]
) -> ray.data.Dataset:
    pool = pool_for(settings.workers, settings.gpus_per_worker, len(units))
    return mapped(worker, arguments, units, pool, ahead=0)


def _is_chosen(store: Store, rows: pa.Table, facts: dict[str, str]) -> bool:
    """Tell whether the run's table has the same neurons chosen by the same analysis."""
    same, _ = _split(store, "selectivity", facts)
    which = ["label", "layer", "unit"]
    return bool(same.select(which).equals(rows.select(which)))


def _write(store: Store, name: str, rows: pa.Table, facts: dict[str, str]) -> None:
    """Put the rows in the run's table, in place of those of the same analysis."""
    same, others = _split(store, name, facts)
    if len(rows) or len(same):
        write_table(store, name, [others, rows])


def _split(store: Store, name: str, facts: dict[str, str]) -> tuple[pa.Table, pa.Table]:
    """Return the rows of this analysis in the run's table, and those of others."""
    try:
        before = read_table(store, name)
    except DamagedError as error:
        raise InputError(f"{error}; remove the table and run the same commands again") from error
    except FileNotFoundError:
        before = LABEL_SCHEMAS[name].empty_table()
    same = reduce(pc.and_, [pc.equal(before[field.name], facts[field.name]) for field in ANALYSIS])
    return before.filter(same), before.filter(pc.invert(same))
