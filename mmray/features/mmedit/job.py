"""The benchmark as a job. A unit is one record under every method or, in a chain, one file under one method.

RUN/mmedit/FINGERPRINT/     the outcomes of each unit
RUN/tables/mmedit…          the paper's table, and the edits
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyarrow as pa

from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.editing.dataset import EditDataset
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.mmedit import Records, read_records
from mmray.features.mmedit.benchmark import Benchmark
from mmray.features.mmedit.record_edits import Session
from mmray.features.mmedit.settings import MmeditSettings
from mmray.features.mmedit.summary import HARMONIC, summarise
from mmray.features.mmedit.tables import PARTS
from mmray.models.loading import digest, require_images, resolve
from mmray.neurons.model import load_model
from mmray.runs.run import open_run
from mmray.storage import Entry, open_object, open_store

TASKS = {"E-VQA": "vqa", "E-IC": "captioning"}
"""Task → the setting that names its file."""


@dataclass(frozen=True)
class MmeditContext:
    """What workers need in addition to the model and the run."""

    census: CensusSettings
    records: dict[str, Records]
    """By task."""


@dataclass(frozen=True)
class MmeditUnit:
    """Records of one task, edited by these methods."""

    task: str
    start: int
    records: int
    methods: tuple[str, ...]


class MmeditJob(Job[MmeditSettings, MmeditContext]):
    """Edits records by each method, and measures what the edits change and leave alone."""

    name = "mmedit"
    unit_noun = "records"
    parts: ClassVar[dict[str, pa.Schema]] = PARTS

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[MmeditContext]:
        """Read the records. Raises InputError for a text-only model, or one that is no longer the run's."""
        settings, run = self.settings, open_run(self.settings.run)
        census = census_settings(run.info["settings"])
        require_images(census.model, "mmray mmedit", trust_remote_code=census.trust_remote_code)
        if digest(resolve(census.model)) != run.info["digests"]["model"]:
            raise InputError(f"{census.model}: no longer the model of {run.uri}; start a new run with it: mmray census")
        digests, records = run.digests(), dict[str, Records]()
        for task, name in TASKS.items():
            if uri := getattr(settings, name):
                found = read_records(uri, settings.images)
                records[task] = replace(found, records=found.records[: settings.limit])
                store, key = open_object(uri)
                digests[name] = _digest([store.entry(key)])
        if settings.images:
            digests["images"] = _digest(open_store(settings.images).list())
        units = [unit for task, some in records.items() for unit in self._units(task, len(some.records))]
        context = MmeditContext(census, records)
        return Plan([Unit(unit.records, unit) for unit in units], digests, context)

    def _units(self, task: str, count: int) -> list[MmeditUnit]:
        methods = self.settings.chosen
        if self.settings.sequential:
            # An edit in a chain depends on those before it, so a chain can't be cut into several units.
            return [MmeditUnit(task, 0, count, (method,)) for method in methods]
        return [MmeditUnit(task, start, 1, methods) for start in range(count)]

    def worker(self, context: MmeditContext) -> Worker:
        """Load the model, and return the function that edits and measures a unit's records."""
        settings, census = self.settings, context.census
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        dataset = EditDataset(model, open_run(settings.run), "en", census.prompt)
        benchmark = Benchmark(Session(dataset, settings), BaselineReplies(model, settings.batch_size))

        def measure(unit: Unit) -> UnitResult:
            part: MmeditUnit = unit.payload
            found = context.records[part.task]
            some = replace(found, records=found.records[part.start : part.start + part.records])
            if settings.sequential:
                outcomes = benchmark.chain(part.task, some, part.methods[0], settings.sequential)
            else:
                outcomes = benchmark.single(part.task, some, part.methods)
            return UnitResult(outcomes.tables())

        return measure

    def merge(self, plan: Plan[MmeditContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the paper's table and the edits."""
        table = summarise(parts.table("outcomes"), self.settings.draws, self.settings.seed)
        output.table("mmedit", table)
        output.table("mmedit_edits", parts.table("mmedit_edits"))
        means = [row for row in table.to_pylist() if row["measure"] == HARMONIC]
        return {"records": sum(len(some.records) for some in plan.context.records.values()), "harmonic_means": means}


def _digest(entries: Sequence[Entry | None]) -> str:
    # Versions stand for the content: a folder of images may be too large to read for a digest.
    listed = [(entry.key, entry.size, entry.version) for entry in entries if entry is not None]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
