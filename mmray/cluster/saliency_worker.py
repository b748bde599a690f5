"""The actor that measures saliency: one model with its detector, that takes images and commits what it observed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from mmray.cluster.units import UnitWorker
from mmray.cluster.wanted import Wanted
from mmray.cluster.worker import open_data
from mmray.datasets.shards import Manifest
from mmray.errors import InputError
from mmray.evaluation.saliency_batch import Judging, methods_of
from mmray.neurons.concepts import NounSource
from mmray.neurons.model import load_model
from mmray.perception.joint import join_if_asked
from mmray.perception.methods import Located
from mmray.perception.settings import SaliencySettings
from mmray.runs import Receipt, RunFolder
from mmray.settings import CensusSettings
from mmray.storage import patiently


@dataclass(frozen=True)
class SaliencyPlan:
    """All that workers need besides model and data."""

    settings: SaliencySettings
    census: CensusSettings
    manifest: Manifest
    nouns: NounSource
    units: tuple[tuple[str, ...], ...]
    """Samples, by unit of work."""
    shards: Mapping[str, int]
    captions: Mapping[str, str]
    images: Mapping[str, str]
    """The key of each sample's image."""
    pictured: frozenset[str]
    """Samples whose maps are kept."""
    located: Located


class SaliencyWorker(UnitWorker):
    """Loads the model once, then answers each unit of work with the receipt of what it committed."""

    def __init__(self, plan: SaliencyPlan, folder: str, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plan = plan
        try:
            census = plan.census
            model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
            joint = join_if_asked(model, plan.settings.detector, plan.settings.alignment)
            methods_of(plan.settings, detector=joint is not None)
            self.folder = RunFolder.at(folder, patient=True)
            source = patiently(lambda: open_data(census))
            self.wanted = Wanted(source, plan.manifest, plan.shards, plan.captions)
            self.judging = Judging(model, joint, plan.settings, census, plan.nouns, plan.located)
        except InputError as error:
            self.problem = str(error)

    def unit(self, unit: int) -> Receipt:
        """Measure and commit one unit of work."""
        return self.attempted(unit, len(self.plan.units[unit]), lambda: self.commit(unit))

    def commit(self, number: int) -> Receipt:
        """Measure the images of a unit, and commit their rows."""
        began, unit = time.perf_counter(), self.plan.units[number]
        found = self.wanted.samples(unit)
        samples = [found[name] for name in unit if name in found]
        tables, _ = self.judging.tables(samples, self.plan.pictured)
        return self.folder.commit_shard(number, tables, len(unit), time.perf_counter() - began)
