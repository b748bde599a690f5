"""What a census would cost: estimated by arithmetic, or timed on its first samples."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from mmray.data.limits import check_columns
from mmray.data.shards import Manifest, cut
from mmray.data.source import Source
from mmray.engine import Unit
from mmray.engine.clock import timed_phases
from mmray.engine.job import finished
from mmray.features.census.bytes_written import of_shard
from mmray.features.census.cost import CensusEstimate, Timing
from mmray.features.census.estimate import estimate
from mmray.features.census.inputs import open_inputs
from mmray.features.census.job import CensusJob
from mmray.features.census.settings import CensusSettings
from mmray.models.loading import describe_model
from mmray.neurons.concepts import NounSource
from mmray.runs.pieces import join

TIMED = 128
"""Samples that `--measure` analyses."""


def plan_census(settings: CensusSettings, *, measure: bool = False) -> CensusEstimate:
    """Return what the census would cost, without running it.

    With `measure`, a worker in this process analyses the first samples, and its speed gives the time. Nothing is
    written. Raises InputError for anything wrong with the set-up.
    """
    job = CensusJob(settings)
    settings = job.settings
    source, manifest, nouns = open_inputs(settings)
    check_columns(source, manifest)
    model = describe_model(settings.model, trust_remote_code=settings.trust_remote_code)
    found = estimate(settings, source, manifest, nouns, model["widths"], model["parameters"], model["image_tokens"])
    return replace(found, timing=_timing(job, source, manifest, nouns)) if measure else found


def _timing(job: CensusJob, source: Source, manifest: Manifest, nouns: NounSource) -> Timing:
    """Return how long a worker of the job takes for the first `TIMED` samples."""
    worker = job.worker(job.plan_for(source, manifest, nouns).context)
    # The first batch pays for what happens once: kernels, buffers, proofs about the model.
    for samples in (job.settings.batch_size, TIMED):
        shard = cut(source.files(), samples, min(samples, manifest.samples), source.image_end).shards[0]
        began = time.perf_counter()
        with timed_phases() as phases:
            tables = finished(worker(Unit(shard.samples, shard))).tables
        seconds = time.perf_counter() - began
    return Timing(shard.samples, seconds, dict(Counter(phases).most_common()), of_shard(join(tables), shard.samples))
