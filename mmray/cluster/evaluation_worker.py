"""The actor of an evaluation: one model replica that measures units of work and commits their rows; a thin shell."""

from __future__ import annotations

import time
from collections.abc import Callable

from mmray.cluster.evaluation_plan import Plan, Unit, open_measured, part_of
from mmray.cluster.units import UnitWorker
from mmray.cluster.worker import open_data
from mmray.datasets.samples import Sample
from mmray.datasets.shards import read_shard
from mmray.errors import InputError
from mmray.evaluation.asks import Edit
from mmray.evaluation.before import Before
from mmray.evaluation.measuring import Measuring
from mmray.evaluation.rows import Rows
from mmray.neurons.model import load_model
from mmray.runs import Receipt, RunFolder
from mmray.storage import open_store

Opener = Callable[[str], Edit]
"""From an edit's folder to the edit."""


class EvaluationWorker(UnitWorker):
    """Loads model and edit once, then answers each unit of work with the receipt of what it committed."""

    def __init__(self, plan: Plan, folder: str, opener: Opener, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plan = plan
        try:
            census = plan.census
            model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
            self.folder = RunFolder(open_store(folder))
            self.before = Before(model, plan.settings.batch_size, plan.settings.prompt)
            self.measuring = Measuring(self.before, opener(plan.settings.edit), plan.facts, plan.settings)
        except InputError as error:
            self.problem = str(error)

    def unit(self, unit: int) -> Receipt:
        """Measure and commit one unit of work."""
        return self.attempted(unit, self.plan.units[unit].samples, lambda: self.commit(unit))

    def commit(self, number: int) -> Receipt:
        """Measure a unit, and commit its rows."""
        began = time.perf_counter()
        unit = self.plan.units[number]
        tables = self.measured(unit).tables()
        # Units share no sample, and what is kept of them would only grow.
        self.before.forget()
        return self.folder.commit_shard(number, tables, unit.samples, time.perf_counter() - began)

    def measured(self, unit: Unit) -> Rows:
        """Return the rows of a unit."""
        if unit.kind == "texts":
            return self.measuring.texts(self.plan.texts[unit.start : unit.start + unit.samples])
        if unit.kind == "records":
            assert self.plan.records is not None
            return self.measuring.records(part_of(self.plan.records, unit))
        if unit.kind == "data":
            rows = read_shard(open_measured(self.plan.census), self.plan.manifest.shards[unit.number])
            return self.measuring.samples(list(rows))
        assert self.plan.own_manifest is not None
        found = read_shard(open_data(self.plan.own), self.plan.own_manifest.shards[unit.number])
        wanted = set(unit.names)
        return self.measuring.samples([s for s in found if isinstance(s, Sample) and s.sample_id in wanted], own=True)
