"""Properties as a job: each unit is a few concepts, measured on their images and on others, with heat maps."""

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
    """Measures properties of a run's neurons, with controls."""

    name = "properties"
    unit_noun = "concepts"
    parts: ClassVar[dict[str, pa.Schema]] = {name: PARTS[name] for name in ("observations", "heatmaps")}

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[RunSamples]:
        """Choose the concepts, and the images to measure each on."""
        return plan_properties(self.settings, open_run(self.settings.run))

    def worker(self, context: RunSamples) -> Worker:
        """Load the model, and return the worker that measures the concepts of a unit."""
        census = context.census
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        run = open_run(self.settings.run)
        # A checkpoint may have been replaced since the census.
        if list(model.widths) != run.info["model"]["widths"]:
            raise InputError(f"{census.model}: not the model of {run.uri}: its layers have different widths")
        # Decoded tokens are looked up by row, so rows must be in the order of the neurons' index.
        neurons = run.table("neurons").sort_by([("layer", "ascending"), ("unit", "ascending")])
        cache = context.open_cache()
        # Captions are as long as these settings say, not those of the census.
        captioning = census.model_copy(update={"longest": self.settings.longest})
        probe = Probe(Study(model, captioning, context.nouns, neurons), self.settings)

        def measure(unit: Unit) -> UnitResult:
            found = Observations()
            sample_ids = {name for inputs in unit.payload for name in (*inputs.own, *inputs.others, *inputs.maps)}
            probe.unit(unit.payload, cache.samples(sample_ids), found)
            return UnitResult(found.tables())

        return measure

    def merge(self, plan: Plan[RunSamples], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the measures with their intervals, and the heat maps."""
        settings, maps = self.settings, parts.table("heatmaps")
        # With --only, the other table stays as an earlier call wrote it.
        if settings.only != "maps":
            observed = parts.table("observations")
            held_out = settings.held_out is not None
            table = summarise(observed, settings.draws, settings.seed, plan.context.images, held_out=held_out)
            output.table("properties", table)
        # The report shows maps over the run's own images.
        if settings.only != "properties" and settings.held_out is None:
            output.table("heatmaps", maps)
        return {"concepts": sum(unit.size for unit in plan.units), "heatmaps": len(maps)}
