"""The two jobs of `mmray selectivity`, one unit per shard: sums per label, and tests of the chosen neurons."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

from mmray.data.samples import Sample
from mmray.data.shards import Manifest
from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.features.census.inputs import open_data
from mmray.features.census.run_samples import scored_samples
from mmray.features.selectivity.interventions import measure_interventions
from mmray.features.selectivity.logit_lens import Lens
from mmray.features.selectivity.masks import RANDOM, SELECTED, Mask
from mmray.features.selectivity.plan import LabelPlan
from mmray.features.selectivity.settings import SelectivitySettings, SumsSettings
from mmray.features.selectivity.steering import Steer, steered_captions
from mmray.features.selectivity.sums import LabelSums
from mmray.features.selectivity.tables import PARTS
from mmray.features.selectivity.texts import captions_of, in_batches
from mmray.models.loading import LoadedModel
from mmray.neurons.model import load_model
from mmray.runs import RunFolder
from mmray.runs.run import open_run

S = TypeVar("S", bound=SumsSettings)


class LabelJob(Job[S, LabelPlan]):
    """A pass over the samples that have a label. The driver reads its parts and writes the tables."""

    name = "selectivity"
    step: ClassVar[str]
    """Folder of the pass's parts, below that of its fingerprint."""

    def __init__(self, settings: S, labelled: LabelPlan) -> None:
        super().__init__(settings)
        self.labelled = labelled

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def folder(self, fingerprint: str) -> str:
        """Return where shards are committed."""
        return f"{super().folder(fingerprint)}/{self.step}"

    def plan(self) -> Plan[LabelPlan]:
        """Return a plan with one unit per shard that holds samples with a label."""
        labelled = self.labelled
        units = [Unit(len(labelled.captions[shard]), shard) for shard in labelled.shards]
        model = open_run(self.settings.run).info["digests"]["model"]
        return Plan(units, {"model": model, "samples": labelled.digest(), **self.digests()}, labelled)

    def worker(self, context: LabelPlan) -> Worker:
        """Load the model, and return the worker that measures a shard's samples."""
        census = context.census
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        # The run's own shards, because samples are known by the shard that the census read them from.
        manifest = Manifest.from_json(RunFolder.at(self.settings.run).manifest())
        source = open_data(census)

        def measure(unit: Unit) -> UnitResult:
            samples = scored_samples(source, manifest.shards[unit.payload], context.captions[unit.payload])
            return UnitResult(self.tables(model, list(samples)))

        return measure

    def merge(self, plan: Plan[LabelPlan], parts: Parts, output: Output) -> dict[str, Any]:
        """Write nothing: the tables need the parts of both passes, so the driver writes them."""
        return {}

    @abstractmethod
    def digests(self) -> Mapping[str, str]:
        """Return digests of what the pass depends on in addition to its settings, the model and the samples."""

    @abstractmethod
    def tables(self, model: LoadedModel, samples: list[Sample]) -> dict[str, pa.Table]:
        """Return the parts to commit for a shard's samples."""


class SumsJob(LabelJob[SumsSettings]):
    """Sums up activity or contributions per label and replicate, over the samples that the selection sees."""

    step = "sums"
    parts: ClassVar[dict[str, pa.Schema]] = {"sums": PARTS["sums"]}

    def __init__(self, labelled: LabelPlan) -> None:
        super().__init__(labelled.settings.sums(), labelled)

    def digests(self) -> Mapping[str, str]:
        """Return whether sums per token of an answer are kept, too, which steering needs."""
        return {"course": str(self.labelled.settings.steer is not None)}

    def tables(self, model: LoadedModel, samples: list[Sample]) -> dict[str, pa.Table]:
        """Return the shard's sums over the samples that the selection sees."""
        plan, settings = self.labelled, self.labelled.settings
        sums = LabelSums(model, settings, plan.replicates)
        seen = [sample for sample in samples if sample.sample_id in plan.replicates.columns]
        texts = captions_of(model, seen, settings.by, plan.census)
        in_batches(model, texts, settings.batch_size, sums.add, sums.most_tokens)
        return {"sums": sums.table()}


@dataclass(frozen=True)
class Tests:
    """Interventions on the held-out samples."""

    masks: tuple[Mask, ...]
    steer: Steer | None

    def digest(self) -> str:
        """Return a digest of the neurons, and of the values they are set to."""
        # A tuple of frozen dataclasses has a stable repr.
        found = hashlib.sha256(repr(self.masks).encode())
        if self.steer is not None:
            found.update(self.steer.neurons.tobytes() + self.steer.values.tobytes())
        return found.hexdigest()[:16]


class TestsJob(LabelJob[SelectivitySettings]):
    """Tests the chosen neurons on held-out samples."""

    step = "tests"
    parts: ClassVar[dict[str, pa.Schema]] = {
        name: schema for name, schema in PARTS.items() if name not in SumsJob.parts
    }

    def __init__(self, labelled: LabelPlan, tests: Tests) -> None:
        super().__init__(labelled.settings, labelled)
        self.tests = tests

    def digests(self) -> Mapping[str, str]:
        """Return a digest of the neurons: a shard that was quarantined once may change the choice later."""
        return {"neurons": self.tests.digest()}

    def tables(self, model: LoadedModel, samples: list[Sample]) -> dict[str, pa.Table]:
        """Return one part per requested test, for the shard's held-out samples."""
        plan, settings, census = self.labelled, self.settings, self.labelled.census
        held_out = [sample for sample in samples if sample.sample_id in plan.held_out]
        tables = dict[str, pa.Table]()
        if settings.interventions:
            tables |= measure_interventions(model, held_out, self.tests.masks, settings, census)
        if settings.stages:
            lens = Lens(model, [mask for mask in self.tests.masks if mask.control in (SELECTED, RANDOM)])
            in_batches(model, captions_of(model, held_out, settings.by, census), settings.batch_size, lens.add)
            tables["lens"] = lens.table()
        if self.tests.steer is not None:
            source = [sample for sample in held_out if plan.labelled[sample.sample_id] == self.tests.steer.source]
            rows = steered_captions(model, source, self.tests.steer, census, settings.batch_size)
            tables["replies"] = pa.Table.from_pylist(rows, schema=PARTS["replies"])
        return tables
