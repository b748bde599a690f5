"""Properties as a job: a unit is a few concepts, each measured on its images and others, with heat maps."""

from __future__ import annotations

from typing import Any, ClassVar

import pyarrow as pa

from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.census.run_samples import RunSamples
from mmray.features.properties.observations import Observations, summarise
from mmray.features.properties.plan import plan_properties
from mmray.features.properties.probe import Probe
from mmray.features.properties.settings import PropertySettings
from mmray.features.properties.subject import Study
from mmray.features.properties.tables import PARTS
from mmray.neurons.model import load_model
from mmray.runs.run import open_run


class PropertiesJob(Job[PropertySettings, RunSamples]):
    """Measures what a run's neurons mean, with controls."""

    name = "properties"
    unit_noun = "concepts"
    parts: ClassVar[dict[str, pa.Schema]] = {name: PARTS[name] for name in ("observations", "heatmaps")}

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[RunSamples]:
        """Settle which concepts are measured on which images."""
        return plan_properties(self.settings, open_run(self.settings.run))

    def worker(self, context: RunSamples) -> Worker:
        """Load the model, and return what measures the concepts of a unit."""
        census = context.census
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        run = open_run(self.settings.run)
        if list(model.widths) != run.info["model"]["widths"]:
            raise InputError(f"{census.model}: not the model of {run.uri}, whose layers have other widths")
        neurons = run.table("neurons").sort_by([("layer", "ascending"), ("unit", "ascending")])
        wanted = context.open_cache()
        probe = Probe(Study(model, census, context.nouns, neurons), self.settings)

        def measure(unit: Unit) -> UnitResult:
            found = Observations()
            names = {name for facts in unit.payload for name in (*facts.own, *facts.others, *facts.maps)}
            probe.unit(unit.payload, wanted.samples(names), found)
            return UnitResult(found.tables())

        return measure

    def merge(self, plan: Plan[RunSamples], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the measures with their intervals, and the heat maps."""
        settings, maps = self.settings, parts.table("heatmaps")
        # A part that was not asked for keeps the table that an earlier call wrote.
        if settings.only != "maps":
            observed = parts.table("observations")
            output.table("properties", summarise(observed, settings.draws, settings.seed, plan.context.images))
        if settings.only != "properties":
            output.table("heatmaps", maps)
        return {"concepts": sum(unit.size for unit in plan.units), "heatmaps": len(maps)}
