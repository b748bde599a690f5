"""Concepts of a run, or a range of them, ranked once all shards are added up, several at a time in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.features.census.concept_merge import AddUp, ConceptMerge
from mmray.features.census.neuron_sums import Samples
from mmray.features.census.ranking import (
    NO_USES,
    RankedNeurons,
    Uses,
    certified_counts,
    neuron_names,
    rank_concept,
    ranking_table,
)
from mmray.features.census.spill import Spill
from mmray.features.census.tables import TABLES
from mmray.neuron_names import PLAIN, NeuronNames

USES = pa.schema([("concept", pa.string()), ("image", pa.uint64()), ("neurons", pa.list_(pa.int32()))])
"""Columns that are kept of occurrences until their concept is ranked."""

INDEX = pa.field("index", pa.int64())
"""A neuron's place over all layers."""
BY_NEURON = TABLES["neuron_concepts"].append(INDEX)

TOGETHER = 16
"""Concepts whose rankings become a table at a time."""
RANKERS = 4
"""Threads that rank concepts, at most; each holds TOGETHER concepts. Most of their work is NumPy's, outside the GIL."""


class ConceptRankings:
    """Ranks the neurons of every concept; `concepts` and `uses` have the same cuts."""

    def __init__(
        self,
        concepts: ConceptMerge,
        cuts: Sequence[str],
        widths: Sequence[int],
        decoded: pa.Table,
        top_k: int,
        names: NeuronNames = PLAIN,
    ) -> None:
        self.concepts = concepts
        self.uses = Spill(USES, cuts)
        """Image and top-k neurons of every occurrence."""
        self.widths = widths
        self.names = neuron_names(widths, names)
        self.decoded = decoded
        self.top_k = top_k
        self.ranked = 0
        """Concepts in `rankings`."""
        self.certified = [0, 0]
        """See `certified_counts`."""
        self.concepts_per_neuron = np.zeros(sum(widths), np.int64)

    def tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield rows of `rankings`, concepts in alphabetical order, and the same as rows of BY_NEURON."""
        # With more threads than cores, they spoil each other's caches.
        threads = min(RANKERS, cores())
        with ThreadPoolExecutor(threads) as pool:
            waiting: deque[Future[tuple[list[RankedNeurons], pa.Table]]] = deque()
            for concepts, uses in zip(self.concepts.ranges(), map(uses_by_concept, self.uses.ranges()), strict=True):
                # Few concepts at a time: a table of the whole range takes more memory than its sums.
                while some := list(islice(concepts, TOGETHER)):
                    waiting.append(pool.submit(self._ranked, some, uses))
                    if len(waiting) > threads:
                        yield self._counted(*waiting.popleft().result())
            while waiting:
                yield self._counted(*waiting.popleft().result())

    def _ranked(
        self, some: Sequence[tuple[str, AddUp]], uses: Mapping[str, Uses]
    ) -> tuple[list[RankedNeurons], pa.Table]:
        """Return the rankings of some concepts, also as a table."""
        ranked = [
            rank_concept(concept, add_up(), self.concepts, uses.get(concept, NO_USES), self.top_k)
            for concept, add_up in some
        ]
        return ranked, ranking_table(ranked, self.widths, self.names, self.decoded)

    def _counted(self, ranked: Sequence[RankedNeurons], rankings: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Take in what other tables, and the headline, say about these rankings, and return them."""
        for one in ranked:
            # Its top neurons are different ones, so that each is counted: numpy would add to a repeated index once.
            self.concepts_per_neuron[one.top] += 1
        self.ranked += len(ranked)
        self.certified = list(map(sum, zip(self.certified, certified_counts(rankings), strict=True)))
        index = pa.array(np.concatenate([one.neuron for one in ranked]))
        return rankings, rankings.select(TABLES["neuron_concepts"].names).append_column(INDEX, index)


def cores() -> int:
    """Return how many cores this process may use: Ray tells a worker its share in OMP_NUM_THREADS."""
    # A user may give a list, one number per level of nesting.
    share = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return (int(share) if share.isdecimal() else 0) or os.cpu_count() or 1


def sorted_by_neuron(rows: pa.Table) -> pa.Table:
    """Return the rows of `neuron_concepts` that are made from these of BY_NEURON."""
    # The index orders neurons by layer and unit, as the schema of the table promises.
    keys = [(INDEX.name, "ascending"), ("rank", "ascending"), ("score", "descending")]
    return rows.sort_by(keys).drop_columns(INDEX.name)


def uses_of(occurrences: pa.Table, samples: Samples, widths: Sequence[int]) -> pa.Table:
    """Return the rows of USES of a shard."""
    lists = occurrences["neurons"].combine_chunks()
    entries, starts = lists.flatten(), np.cumsum([0, *widths])
    neurons = starts[entries.field("layer").to_numpy()] + entries.field("unit").to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())])
    images = samples.images()
    columns = {
        "concept": occurrences["concept"],
        "image": np.array([images[name] for name in occurrences["sample_id"].to_pylist()], np.uint64),
        "neurons": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(neurons, pa.int32())),
    }
    return pa.table(columns, schema=USES)


def uses_by_concept(rows: pa.Table) -> dict[str, Uses]:
    """Return the uses of each concept of these rows."""
    rows = rows.sort_by("concept").combine_chunks()
    if not len(rows):
        return {}
    names, lists = rows["concept"].combine_chunks(), rows["neurons"].combine_chunks()
    images, neurons = rows["image"].to_numpy(), lists.flatten().to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())])
    # Names are sorted, so that the end of each run of equal ones is where a concept's rows end.
    counted = pc.run_end_encode(names)
    ends = counted.run_ends.to_numpy()
    return {
        name: Uses(images[start:stop], neurons[offsets[start] : offsets[stop]])
        for name, start, stop in zip(counted.values.to_pylist(), [0, *ends[:-1]], ends, strict=True)
    }
