"""The validation of an aligned network as a job: each unit is a few samples, for the original and the joint model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from mmray.data.shards import Manifest, cut, read_shard
from mmray.data.sources import open_source
from mmray.detector.alignment import FACTS, load_alignment
from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.alignment.settings import AlignmentSettings
from mmray.features.alignment.tower_swap import TowerSwap
from mmray.features.alignment.training import open_pair
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.evaluator import EditEvaluator
from mmray.features.evaluation.settings import MeasureSettings, measure_settings
from mmray.features.evaluation.summary import summarise
from mmray.features.evaluation.tables import PARTS
from mmray.models.loading import digest, resolve
from mmray.objects.ground_truth import survey
from mmray.objects.statistics import ObjectStatistics
from mmray.runs import RunFolder
from mmray.storage import with_retries

UNIT = 50
"""Samples per unit of work."""


@dataclass(frozen=True)
class Validation:
    """The measures of a validation, and its samples."""

    measured: MeasureSettings
    manifest: Manifest
    object_statistics: ObjectStatistics


def plan_validation(settings: AlignmentSettings) -> Validation:
    """Choose measures and samples; raises InputError if the data has no objects."""
    source = open_source(settings.validate_on, captions=False)
    if source.columns.objects is None:
        raise InputError(f"{settings.validate_on}: has no column of objects; give validation data that has one")
    manifest = cut(source.files(), UNIT, settings.validate_limit)
    if not manifest.samples:
        raise InputError(f"{settings.validate_on}: has no samples")
    found = survey(source, None, None)
    # Only what a tower can change: no texts without an image; and no BLEU, because captions are not needed.
    measured = measure_settings(
        text_count=0,
        bleu=False,
        pope_objects=settings.pope_objects,
        ground_truth=found.ground_truth,
        synonyms=found.synonyms,
        draws=settings.draws,
        seed=settings.seed,
    )
    return Validation(measured, manifest, found.statistics)


class ValidationJob(Job[AlignmentSettings, Validation]):
    """Measures the joint model and the original; `alignment` is the fingerprint of the training."""

    name = "validation"
    parts: ClassVar[dict[str, pa.Schema]] = {name: PARTS[name] for name in ("measurements", "captions")}

    def __init__(self, settings: AlignmentSettings, alignment: str, validation: Validation) -> None:
        super().__init__(settings)
        self.alignment = alignment
        self.validation = validation

    @property
    def target(self) -> str:
        """The folder of the aligned network."""
        return self.settings.out.rstrip("/")

    def plan(self) -> Plan[Validation]:
        """Return a plan with a few samples per unit."""
        validation = self.validation
        # Draws only affect intervals, which the merge computes: other values need no unit to run again.
        measured = repr(validation.measured.model_dump(exclude={"draws"}))
        digests = {
            "alignment": self.alignment,
            "data": validation.manifest.digest,
            "samples": str(validation.manifest.samples),
            "measured": hashlib.sha256(measured.encode()).hexdigest()[:16],
        }
        units = [Unit(shard.samples, shard.shard_id) for shard in validation.manifest.shards]
        return Plan(units, digests, validation)

    def worker(self, context: Validation) -> Worker:
        """Load both models, and return the worker that measures the samples of a unit."""
        settings = self.settings
        pair = open_pair(settings)
        # Not measured yet: that is what this job does.
        network = load_alignment(settings.out, pair.model, digest(resolve(settings.tower)), measured=False)
        baseline = BaselineReplies(pair.model)
        joint = TowerSwap(pair.tower, network)
        evaluator = EditEvaluator(baseline, joint, context.object_statistics, context.measured)
        source = open_source(settings.validate_on, captions=False)

        def measure(unit: Unit) -> UnitResult:
            samples = list(read_shard(source, context.manifest.shards[unit.payload]))
            tables = evaluator.samples(samples).tables()
            baseline.clear()  # no other unit has these samples
            return UnitResult(tables)

        return measure

    def merge(self, plan: Plan[Validation], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the measures to the description of the network."""
        description = json.loads(with_retries(lambda: RunFolder.at(self.target)).store.read(FACTS))
        measures = summarise(parts.table("measurements"), plan.context.measured)
        description["measures"] = {name: value for name, value in measures.items() if value["n"]}
        samples = sum(receipt.samples for receipt in parts.receipts.values())
        data = {"data": self.settings.validate_on, "digest": plan.context.manifest.digest, "samples": samples}
        output.file(FACTS, json.dumps(description | {"validated_on": data}, indent=1).encode())
        return {"measures": description["measures"], "training": description["training"]}
