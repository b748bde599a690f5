"""The actor that measures properties: one model replica that takes concepts and commits their rows; a thin shell."""

from __future__ import annotations

import time

from mmray.cluster.properties_plan import Plan
from mmray.cluster.units import UnitWorker
from mmray.cluster.wanted import Wanted
from mmray.cluster.worker import open_data
from mmray.errors import InputError
from mmray.evaluation.properties.observations import Observations
from mmray.evaluation.properties.probe import Probe
from mmray.evaluation.properties.subject import Study
from mmray.neurons.model import load_model
from mmray.results.run import open_run
from mmray.runs import Receipt, RunFolder
from mmray.storage import patiently


class PropertiesWorker(UnitWorker):
    """Loads the model once, then answers each unit of work with the receipt of what it committed."""

    def __init__(self, plan: Plan, folder: str, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plan = plan
        try:
            census = plan.census
            model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
            run = open_run(plan.settings.run, patient=True)
            if list(model.widths) != run.info["model"]["widths"]:
                raise InputError(f"{census.model}: not the model of {run.uri}, whose layers have other widths")
            neurons = run.table("neurons").sort_by([("layer", "ascending"), ("unit", "ascending")])
            self.folder = RunFolder.at(folder, patient=True)
            source = patiently(lambda: open_data(census))
            self.wanted = Wanted(source, plan.manifest, plan.shards, plan.captions)
            self.probe = Probe(Study(model, census, plan.nouns, neurons), plan.settings)
        except InputError as error:
            self.problem = str(error)

    def unit(self, unit: int) -> Receipt:
        """Measure and commit one unit of work."""
        return self.attempted(unit, len(self.plan.units[unit]), lambda: self.commit(unit))

    def commit(self, number: int) -> Receipt:
        """Measure the concepts of a unit, and commit their rows."""
        began = time.perf_counter()
        found, unit = Observations(), self.plan.units[number]
        names = {name for facts in unit for name in (*facts.own, *facts.others, *facts.maps)}
        self.probe.unit(unit, self.wanted.samples(names), found)
        return self.folder.commit_shard(number, found.tables(), len(unit), time.perf_counter() - began)
