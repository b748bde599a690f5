"""The validation of an aligned network: what is asked, and the actor that asks the original and the joint model."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from mmray.cluster.alignment_training import open_pair
from mmray.cluster.units import UnitWorker
from mmray.datasets.shards import Manifest, cut, read_shard
from mmray.datasets.sources import open_source
from mmray.errors import InputError
from mmray.evaluation.before import Before
from mmray.evaluation.facts import DataFacts
from mmray.evaluation.ground_truth import survey
from mmray.evaluation.measuring import Measuring
from mmray.evaluation.settings import MeasureSettings, measure_settings
from mmray.models.loading import digest, resolve
from mmray.perception.alignment import load_alignment
from mmray.perception.alignment_settings import AlignmentSettings
from mmray.perception.standing_in import OtherSight
from mmray.runs import Receipt, RunFolder

UNIT = 50
"""Samples of a unit of work."""


@dataclass(frozen=True)
class Plan:
    """All that the validation's workers need besides the weights."""

    settings: AlignmentSettings
    measured: MeasureSettings
    manifest: Manifest
    facts: DataFacts

    def fingerprint(self, alignment: str) -> str:
        """Return a digest of what is measured, and of which alignment."""
        asked = repr((alignment, self.manifest.digest, self.manifest.samples, self.measured))
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def plan_validation(settings: AlignmentSettings) -> Plan:
    """Settle what is measured; raises InputError where the data has no objects."""
    source = open_source(settings.validate_on, captions=False)
    if source.columns.objects is None:
        raise InputError(f"{settings.validate_on}: no column of objects, without which nothing can be validated")
    manifest = cut(source.files(), UNIT, settings.validate_limit)
    if not manifest.samples:
        raise InputError(f"{settings.validate_on}: no sample in it")
    found = survey(source, None, None)
    measured = measure_settings(
        text_count=0,
        bleu=False,
        pope_objects=settings.pope_objects,
        ground_truth=found.ground_truth,
        synonyms=found.synonyms,
        draws=settings.draws,
        seed=settings.seed,
    )
    return Plan(settings, measured, manifest, found.facts)


class ValidationWorker(UnitWorker):
    """Loads both models once, then answers each unit of work with the receipt of what it committed."""

    def __init__(self, plan: Plan, folder: str, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plan = plan
        try:
            settings = plan.settings
            pair = open_pair(settings)
            network = load_alignment(settings.out, pair.model, digest(resolve(settings.tower)), measured=False)
            self.folder = RunFolder.at(folder, patient=True)
            self.before = Before(pair.model)
            self.measuring = Measuring(self.before, OtherSight(pair.sight, network), plan.facts, plan.measured)
        except InputError as error:
            self.problem = str(error)

    def unit(self, unit: int) -> Receipt:
        """Measure and commit one unit of work."""
        return self.attempted(unit, self.plan.manifest.shards[unit].samples, lambda: self.commit(unit))

    def commit(self, number: int) -> Receipt:
        """Measure the samples of a unit, and commit their rows."""
        began = time.perf_counter()
        shard = self.plan.manifest.shards[number]
        source = open_source(self.plan.settings.validate_on, captions=False)
        tables = self.measuring.samples(list(read_shard(source, shard))).tables()
        self.before.forget()
        return self.folder.commit_shard(number, tables, shard.samples, time.perf_counter() - began)
