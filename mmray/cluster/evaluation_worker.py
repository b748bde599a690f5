"""The actor of an evaluation: one model replica that measures units of work and commits their rows; a thin shell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mmray.cluster.carrying import Folders
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

Opener = Callable[[str], Edit]
"""From an edit's folder to the edit."""


class EvaluationWorker(UnitWorker):
    """Loads the model once, and each edit once, then answers units of work with receipts of what it committed.

    Units that read the same, one after the other, are asked of the unedited model once, whatever edit each measures.
    """

    def __init__(self, plans: Sequence[Plan], folders: Sequence[str], opener: Opener, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plans = plans
        opened = [RunFolder.at(uri, patient=True) for uri in folders]
        self.folders = Folders(opened, [len(plan.units) for plan in plans])
        self.opener = opener
        self.measuring: dict[int, Measuring] = {}
        self.read: tuple[str, int] | None = None
        try:
            census, settings = plans[0].census, plans[0].settings
            model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
            self.before = Before(model, settings.batch_size, settings.prompt, settings.longest)
        except InputError as error:
            self.problem = str(error)

    def unit(self, unit: int) -> Receipt:
        """Measure and commit one unit of work."""
        edit, number = self.folders.place(unit)
        plan, self.folder = self.plans[edit], self.folders.folders[edit]
        reads = plan.units[number].kind, plan.units[number].number
        if reads != self.read:
            # Units that read something else share no sample, and what is kept would only grow.
            self.before.forget()
            self.read = reads
        if edit not in self.measuring:
            self.measuring[edit] = Measuring(self.before, self.opener(plan.settings.edit), plan.facts, plan.settings)
        measuring = self.measuring[edit]
        return self.attempted(number, plan.units[number].samples, lambda: self.commit(plan, measuring, number))

    def commit(self, plan: Plan, measuring: Measuring, number: int) -> Receipt:
        """Measure a unit, and commit its rows."""
        began = time.perf_counter()
        unit = plan.units[number]
        tables = _measured(plan, measuring, unit).tables()
        return self.folder.commit_shard(number, tables, unit.samples, time.perf_counter() - began)


def _measured(plan: Plan, measuring: Measuring, unit: Unit) -> Rows:
    if unit.kind == "texts":
        return measuring.texts(plan.texts[unit.start : unit.start + unit.samples])
    if unit.kind == "records":
        assert plan.records is not None
        return measuring.records(part_of(plan.records, unit))
    if unit.kind == "data":
        return measuring.samples(list(read_shard(open_measured(plan.census), plan.manifest.shards[unit.number])))
    assert plan.own_manifest is not None
    found = read_shard(open_data(plan.own), plan.own_manifest.shards[unit.number])
    wanted = set(unit.names)
    return measuring.samples([s for s in found if isinstance(s, Sample) and s.sample_id in wanted], own=True)
