"""The actors of `mmray selectivity`: one sums up what neurons do by label, one tests what was chosen; thin shells."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa

from mmray.cluster.labels_plan import Plan
from mmray.cluster.units import UnitWorker
from mmray.cluster.worker import open_data
from mmray.datasets.samples import Sample
from mmray.datasets.shards import Manifest, read_shard
from mmray.errors import InputError
from mmray.label_tables import PASS_SCHEMAS
from mmray.neurons.labels.masks import SELECTED, Mask
from mmray.neurons.labels.material import captions_of, in_batches
from mmray.neurons.labels.stages import Lens
from mmray.neurons.labels.steering import Steer, written
from mmray.neurons.labels.sums import LabelSums
from mmray.neurons.labels.testing import measured
from mmray.neurons.model import load_model
from mmray.runs import Receipt, RunFolder
from mmray.storage import patiently
from mmray.tables import PART_SCHEMAS


@dataclass(frozen=True)
class Tests:
    """What is done to the held-out samples."""

    masks: tuple[Mask, ...]
    steer: Steer | None


class LabelWorker(UnitWorker):
    """Loads the model once, then answers each shard with the receipt of what it committed."""

    def __init__(self, plan: Plan, folder: str, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plan = plan
        census = plan.census
        try:
            self.model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
            self.folder = RunFolder.at(folder, patient=True)
            self.manifest = Manifest.from_json(RunFolder.at(plan.settings.run, patient=True).manifest())
            self.source = patiently(lambda: open_data(census))
        except InputError as error:
            self.problem = str(error)

    @abstractmethod
    def tables(self, samples: list[Sample]) -> dict[str, pa.Table]:
        """Return what is to be committed of a shard's samples."""

    def unit(self, unit: int) -> Receipt:
        """Do and commit one unit of work: the shard of that place in the plan."""
        texts = self.plan.captions[self.plan.shards[unit]]
        return self.attempted(unit, len(texts), lambda: self.commit(unit))

    def commit(self, unit: int) -> Receipt:
        """Commit what a shard's samples show."""
        began = time.perf_counter()
        samples = list(self.samples(self.plan.shards[unit]))
        tables = self.tables(samples) | {"errors": PART_SCHEMAS["errors"].empty_table()}
        # Samples of one id are one, as they are in the plan.
        count = len({sample.sample_id for sample in samples})
        return self.folder.commit_shard(unit, tables, count, time.perf_counter() - began)

    def samples(self, shard: int) -> Iterator[Sample]:
        """Yield a shard's samples, with the captions that the run scored."""
        texts = self.plan.captions[shard]
        for sample in read_shard(self.source, self.manifest.shards[shard]):
            if isinstance(sample, Sample) and sample.sample_id in texts:
                yield replace(sample, caption=texts[sample.sample_id])


class SumsWorker(LabelWorker):
    """Sums up what neurons do, by label and replicate."""

    def tables(self, samples: list[Sample]) -> dict[str, pa.Table]:
        """Return the shard's sums over the samples that are selected from."""
        settings, census = self.plan.settings, self.plan.census
        sums = LabelSums(self.model, settings, self.plan.replicates)
        seen = [sample for sample in samples if sample.sample_id in self.plan.replicates.places]
        in_batches(self.model, captions_of(self.model, seen, settings.by, census), settings.batch_size, sums.add)
        return {"sums": sums.table()}


class TestsWorker(LabelWorker):
    """Tests what was chosen on held-out samples."""

    def __init__(self, plan: Plan, tests: Tests, folder: str, threads: int, home: str) -> None:
        super().__init__(plan, folder, threads, home)
        self.tests = tests

    def tables(self, samples: list[Sample]) -> dict[str, pa.Table]:
        """Return what the shard's held-out samples show."""
        settings, census = self.plan.settings, self.plan.census
        held = [sample for sample in samples if sample.sample_id in self.plan.held_out]
        tables = {}
        if settings.interventions:
            tables["measurements"] = measured(self.model, held, self.tests.masks, settings, census)
        if settings.stages:
            own = [mask for mask in self.tests.masks if mask.control == SELECTED]
            lens = Lens(self.model, own, settings.module)
            in_batches(self.model, captions_of(self.model, held, settings.by, census), settings.batch_size, lens.add)
            tables["lens"] = lens.table()
        if self.tests.steer is not None:
            source = [s for s in held if self.plan.labelled[s.sample_id] == self.tests.steer.source]
            rows = written(self.model, source, self.tests.steer, census, settings.batch_size)
            tables["replies"] = pa.Table.from_pylist(rows, schema=PASS_SCHEMAS["replies"])
        return tables
