"""The selection of neurons as a job: a second pass over some samples of a run, one unit per shard of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64
from numpy import ndarray

from mmray.data.samples import Sample
from mmray.data.shards import Manifest, extend
from mmray.engine import Job, JobResult, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.census.inputs import open_data, open_inputs
from mmray.features.census.run_samples import scored_samples
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.census.shard import ShardAnalysis
from mmray.features.select.effects import EFFECTS, CandidateEffects
from mmray.features.select.selection import expected
from mmray.features.select.settings import SelectionSettings
from mmray.models.loading import digest, resolve
from mmray.neurons.concepts import NounSource
from mmray.neurons.model import load_model
from mmray.neurons.token_positions import positions_of
from mmray.runs.run import Run, open_run
from mmray.runs.tables import ERRORS
from mmray.storage import with_retries

OWN_FIRST = 24
"""Samples of each concept that are taken before others fill up the number."""


@dataclass(frozen=True)
class Selection:
    """A concept's neurons, chosen together, and the expected effect of ablating them."""

    concept: str
    neurons: pa.Table
    """Rows of `rankings`, the neuron with the highest weight first."""
    own: float
    """Fall of the concept's log-probability, in nats, to first order."""
    others: float
    """The same for other nouns."""
    own_places: int
    """Positions of the concept that were measured."""
    other_places: int


@dataclass(frozen=True)
class SelectionContext:
    """What workers need in addition to model and data."""

    census: CensusSettings
    manifest: Manifest
    nouns: NounSource
    candidates: Mapping[str, Int64[ndarray, " candidate"]]
    """Concept → the neurons that the run ranks, as indices over all layers."""


def selections(done: JobResult, run: Run) -> list[Selection]:
    """Return the selections of a finished job."""
    schema = run.table("rankings").schema
    return [
        Selection(**{**found, "neurons": pa.Table.from_pylist(found["neurons"], schema=schema)})
        for found in done.headline["selections"]
    ]


class SelectionJob(Job[SelectionSettings, SelectionContext]):
    """Measures the effect of each candidate on the nouns of some samples, and chooses neurons together."""

    name = "select"
    parts: ClassVar[dict[str, pa.Schema]] = {"effects": EFFECTS}

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[SelectionContext]:
        """Choose the samples of the second pass."""
        run = open_run(self.settings.run)
        candidates = self._candidates(run)
        census = census_settings(run.info["settings"])
        source, _, nouns = open_inputs(census)
        manifest = Manifest.from_json(run.folder.manifest())
        extend(manifest, source.files(), census.samples_per_shard, census.limit)  # raises for files that have changed
        if digest(resolve(census.model)) != run.info["digests"]["model"]:
            raise InputError(f"{census.model}: no longer the model of {run.uri}; start a new run with it: mmray census")
        # Candidates are indices over all layers, as the effects are concatenated.
        starts = np.cumsum([0, *run.info["model"]["widths"]])
        indices = {
            concept: starts[rows["layer"].to_numpy()] + rows["unit"].to_numpy() for concept, rows in candidates.items()
        }
        shards = _captions(run, list(candidates), self.settings.samples)
        units = [Unit(len(captions), (shard, captions)) for shard, captions in sorted(shards.items())]
        # Generated captions are in the run's tables by now, so they are encoded like those of a dataset.
        own = census.model_copy(update={"captions": "dataset", "module": "language", "score": "effect"})
        return Plan(units, run.digests(), SelectionContext(own, manifest, nouns, indices))

    def worker(self, context: SelectionContext) -> Worker:
        """Load the model, and return the worker that measures effects at a shard's nouns."""
        census = context.census
        model = load_model(census.model, census.dtype, trust_remote_code=census.trust_remote_code)
        source = open_data(census)

        def measure(unit: Unit) -> UnitResult:
            shard, captions = unit.payload
            samples: dict[str, Sample] = {}
            for sample in scored_samples(source, context.manifest.shards[shard], captions):
                samples.setdefault(sample.sample_id, sample)  # a later row with the same id would be another sample
            analysis, effects = ShardAnalysis(model, census, context.nouns, shard), CandidateEffects(context.candidates)
            for items, batch in analysis.encoded(samples.values()):
                effects.add(
                    model, batch, positions_of(batch, [(item.sample.sample_id, item.mentions) for item in items])
                )
            errors = [vars(failure) | {"shard_id": shard} for failure in analysis.failures]
            failed = pa.Table.from_pylist(errors, schema=ERRORS)
            return UnitResult({"effects": effects.table(), "errors": failed})

        return measure

    def merge(self, plan: Plan[SelectionContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Choose each concept's neurons. The run's tables don't change.

        A concept that occurs in quarantined units only has no selection. Raises InputError for one that occurs nowhere.
        """
        effects = CandidateEffects(plan.context.candidates)
        for part in parts.each("effects"):
            effects.add_part(part)
        rows = self._candidates(with_retries(lambda: open_run(self.settings.run)))
        named = [concept for concept in rows if concept in effects.concepts]
        # With a quarantined unit, the missing concept may be in it: then the selection is incomplete, not wrong.
        if len(named) < len(rows) and len(parts.receipts) == len(plan.units):
            concept = next(concept for concept in rows if concept not in named)
            raise InputError(f"{concept}: none of the samples read names it; give more --samples")
        return {"selections": [self._selection(concept, rows[concept], effects) for concept in named]}

    def _candidates(self, run: Run) -> dict[str, pa.Table]:
        """Return concept → its rows of `rankings`."""
        count = len(run.table("rankings"))
        return {concept: run.rank(concept, k=count) for concept in self.settings.concepts}

    def _selection(self, concept: str, rows: pa.Table, effects: CandidateEffects) -> dict[str, Any]:
        measured, chosen = effects.of(concept), effects.choose(concept, self.settings.k)
        row_of = {int(neuron): row for row, neuron in enumerate(effects.candidates[concept])}
        index = [row_of[neuron] for neuron in chosen]
        own, others = expected(measured, index)
        return {
            "concept": concept,
            "neurons": rows.take(pa.array(index, pa.int64())).to_pylist(),
            "own": own,
            "others": others,
            "own_places": len(measured.own),
            "other_places": len(measured.others),
        }


def _captions(run: Run, concepts: Sequence[str], limit: int) -> dict[int, dict[str, str]]:
    """Return shard → sample → scored caption for `limit` samples: the first of each concept, then any others."""
    captions = run.table("captions")
    occurrences = run.table("occurrences").select(["sample_id", "concept"])
    chosen: dict[str, None] = {}
    own = occurrences.filter(pc.is_in(occurrences["concept"], pa.array(list(concepts))))
    found: Counter[str] = Counter()
    for row in own.to_pylist():
        if found[row["concept"]] < OWN_FIRST:
            found[row["concept"]] += 1
            chosen[row["sample_id"]] = None
    # The others come from shards that are read anyway.
    shards = set(captions.filter(pc.is_in(captions["sample_id"], pa.array(list(chosen))))["shard_id"].to_pylist())
    near = captions.filter(pc.is_in(captions["shard_id"], pa.array(sorted(shards), pa.int32())))
    # Some of these are chosen already, so that many more may be passed over.
    for sample_id in near["sample_id"].to_pylist()[: limit + len(chosen)]:
        if len(chosen) >= limit:
            break
        chosen[sample_id] = None
    by_shard: dict[int, dict[str, str]] = defaultdict(dict)
    seen: set[str] = set()
    # If several samples have the same id, that of the first shard counts.
    for row in near.sort_by("shard_id").select(["sample_id", "shard_id", "caption"]).to_pylist():
        if row["sample_id"] in chosen and row["sample_id"] not in seen:
            seen.add(row["sample_id"])
            by_shard[row["shard_id"]][row["sample_id"]] = row["caption"]
    return dict(by_shard)
