"""Choose neurons together from a run: a second pass over some of its samples, for the concepts that are named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.cluster.census import open_inputs
from mmray.datasets.contents import Source
from mmray.datasets.samples import Sample
from mmray.datasets.shards import Manifest, extend, read_shard
from mmray.errors import InputError
from mmray.models.loading import digest, resolve
from mmray.neurons.effects import CandidateEffects
from mmray.neurons.model import load_model
from mmray.neurons.places import places_of
from mmray.neurons.selection import expected
from mmray.neurons.shard import ShardAnalysis
from mmray.results.run import Run
from mmray.settings import census_settings

OWN_FIRST = 24
"""Samples of each concept that are looked for before others fill up the number."""


@dataclass(frozen=True)
class Selection:
    """A concept's neurons, chosen together, and what ablating them should do, in nats to first order."""

    concept: str
    neurons: pa.Table
    """Rows of `rankings`, the neuron of the highest weight first."""
    own: float
    others: float
    own_places: int
    other_places: int


def select_neurons(run: Run, concepts: Sequence[str], count: int = 50, samples: int = 400) -> list[Selection]:
    """Choose, for each concept, `count` of the neurons that the run ranks, so that its noun falls and others stay.

    The run's samples are gone through once more, `samples` of them, forward and backward for each noun: three or four
    times a census of as many. Best on a run of `--score effect`, whose `selective` ranking has the right candidates.
    Raises InputError for an unknown concept, or where model or data are no longer what the run saw.
    """
    candidates = {concept.casefold(): run.rank(concept, k=len(run.table("rankings"))) for concept in concepts}
    census = census_settings(run.info["settings"])
    source, _, nouns = open_inputs(census)
    manifest = Manifest.from_json(run.folder.manifest())
    extend(manifest, source.files(), census.shard_size, census.limit)  # refuses files that are not what they were
    if digest(resolve(census.model)) != run.info["digests"]["model"]:
        raise InputError(f"{census.model}: no longer the model of {run.uri}; begin another run with it: mmray census")
    settings = census.model_copy(update={"captions": "dataset", "module": "language"})
    model = load_model(settings.model, settings.dtype, trust_remote_code=settings.trust_remote_code)
    starts = np.cumsum([0, *model.widths])
    numbered = {
        concept: starts[rows["layer"].to_numpy()] + rows["unit"].to_numpy() for concept, rows in candidates.items()
    }
    effects = CandidateEffects(numbered)
    found = _samples(run, source, manifest, list(candidates), samples)
    for items, batch in ShardAnalysis(model, settings, nouns, 0).encoded(found):
        effects.add(model, batch, places_of(batch, [(item.sample.sample_id, item.mentions) for item in items]))
    return [_selection(concept, rows, numbered[concept], effects, count) for concept, rows in candidates.items()]


def _selection(concept: str, rows: pa.Table, numbered: np.ndarray, effects: CandidateEffects, count: int) -> Selection:
    seen, chosen = effects.of(concept), effects.choose(concept, count)
    if not len(seen.own):
        raise InputError(f"{concept}: none of the samples gone through names it; give more --samples")
    places = {int(neuron): place for place, neuron in enumerate(numbered)}
    index = [places[neuron] for neuron in chosen]
    own, others = expected(seen, index)
    return Selection(concept, rows.take(pa.array(index, pa.int64())), own, others, len(seen.own), len(seen.others))


def _samples(run: Run, source: Source, manifest: Manifest, concepts: Sequence[str], limit: int) -> Iterator[Sample]:
    """Yield the run's samples in order, with the captions that it scored: of each concept the first, then any."""
    captions = run.table("captions")
    occurrences = run.table("occurrences").select(["sample_id", "concept"])
    wanted: dict[str, None] = {}
    own = occurrences.filter(pc.is_in(occurrences["concept"], pa.array(list(concepts))))
    found: Counter[str] = Counter()
    for row in own.to_pylist():
        if found[row["concept"]] < OWN_FIRST:
            found[row["concept"]] += 1
            wanted[row["sample_id"]] = None
    # The others from the shards that are read anyway.
    shards = set(captions.filter(pc.is_in(captions["sample_id"], pa.array(list(wanted))))["shard_id"].to_pylist())
    near = captions.filter(pc.is_in(captions["shard_id"], pa.array(sorted(shards), pa.int32())))
    for sample_id in near["sample_id"].to_pylist()[: limit + len(wanted)]:
        if len(wanted) >= limit:
            break
        wanted[sample_id] = None
    texts = {row["sample_id"]: row["caption"] for row in near.to_pylist() if row["sample_id"] in wanted}
    for shard_id in sorted(shards):
        for sample in read_shard(source, manifest.shards[shard_id]):
            if isinstance(sample, Sample) and sample.sample_id in texts:
                yield replace(sample, caption=texts.pop(sample.sample_id))
