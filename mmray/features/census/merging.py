"""The tables of a run from the committed parts of its shards: sums, maxima and top-k, in the order of the shards.

Everything is recomputed from committed parts, so the number of workers, crashes and resumes cannot change the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import pyarrow as pa

from mmray.engine import Parts
from mmray.errors import InputError
from mmray.features.census.concept_merge import ConceptMerge
from mmray.features.census.concept_rankings import BY_NEURON, INDEX, ConceptRankings, sorted_by_neuron, uses_of
from mmray.features.census.neuron_sums import NeuronSums, Samples, activity_table, example_tables, neuron_table
from mmray.features.census.ranges import pieces_of
from mmray.features.census.spill import Spill, cuts_of
from mmray.features.census.tables import TABLES
from mmray.neuron_names import PLAIN, NeuronNames
from mmray.runs import RunFolder
from mmray.runs.concepts import summarise_rankings
from mmray.storage import with_retries

ReadPart = Callable[[str], pa.Table]
"""Reads one part (`captions`, `concepts`, …) of a committed shard."""

APPENDED = ("captions", "occurrences", "errors")
"""Tables that are the concatenated rows of all shards."""

DECODED = "decoded"
"""Part with the tokens that each neuron writes."""
RANGE = 64 << 20
"""Bytes of committed sums that a range of concepts has; bounds the memory of a merge."""
SAMPLED, SAMPLED_PIECES = 32, 8
"""Shards whose concepts decide where ranges are cut; of shards in pieces, how often each piece is among them."""


def concept_cuts(parts: Parts, ranges: int) -> list[str]:
    """Return the concepts at which to cut the run's concepts into so many ranges of about equal size."""
    if ranges <= 1:
        return []
    pieces = max(len(pieces_of(receipt, "concepts")) for receipt in parts.receipts.values())
    # The shards are spread over the run: its end may be in another language than its beginning.
    sampled = parts.sample("concepts", max(SAMPLED, SAMPLED_PIECES * pieces))
    return cuts_of([name for part in sampled for name in part["concept"].to_pylist()], ranges)


def read_decoded(uri: str) -> pa.Table:
    """Return the tokens that each neuron writes, from the folder of the decoding job.

    Raises InputError if its unit was quarantined.
    """
    folder = with_retries(lambda: RunFolder.at(uri))
    receipt = folder.receipt(0)
    if receipt is None:
        reason = folder.reasons().get(0, "its receipt is gone")
        raise InputError(f"{uri}: the neurons could not be decoded: {reason}; run again with --retry-failed")
    return folder.read_part(receipt, DECODED)


class RunMerge:
    """Adds up the shards of a run one by one, and makes its tables."""

    def __init__(
        self,
        widths: Sequence[int],
        decoded: pa.Table,
        top_k: int,
        modules: Mapping[str, Sequence[int]] = MappingProxyType({}),
        cuts: Sequence[str] = (),
        names: NeuronNames = PLAIN,
    ) -> None:
        self.widths = widths
        self.module_widths = {"language": widths, **modules}
        self.sums = NeuronSums(sum(widths))
        self.concepts = ConceptMerge(sum(widths), cuts)
        self.rankings = ConceptRankings(self.concepts, cuts, widths, decoded, top_k, names)
        # As many ranges of neurons as of concepts: `neuron_concepts` has the rows of `rankings`, in another order.
        starts = [sum(widths) * number // (len(cuts) + 1) for number in range(1, len(cuts) + 1)]
        self.by_neuron = Spill(BY_NEURON, starts)
        """Rankings, regrouped by neuron."""

    def add(self, read: ReadPart) -> dict[str, pa.Table]:
        """Add one shard, and return its rows of the appended tables."""
        rows = {name: read(name) for name in APPENDED}
        # Parts name samples by their row in captions.
        samples = Samples.of(rows["captions"])
        self.concepts.add(read("concepts"), read("totals"))
        self.sums.add(read("activity"), read("examples"), samples)
        self.rankings.uses.add(uses_of(rows["occurrences"], samples, self.widths), "concept")
        return rows

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield the tables made from sums, most of them in pieces."""
        # What was read of the shards is free, but Arrow keeps it for itself.
        pa.default_memory_pool().release_unused()
        for name in ("rankings", "concepts", "neuron_concepts"):
            yield name, TABLES[name].empty_table()
        for rankings, by_neuron in self.rankings.tables():
            self.by_neuron.add(by_neuron, INDEX.name)
            yield "rankings", rankings
            yield "concepts", summarise_rankings(rankings)
        for rows in self.by_neuron.ranges():
            yield "neuron_concepts", sorted_by_neuron(rows)
        ranked, sides = self.rankings, self.sums.examples
        extremes = {"max": sides[1].extreme(), "min": sides[-1].extreme()}
        yield (
            "neurons",
            neuron_table(self.widths, ranked.names, self.sums, extremes, ranked.concepts_per_neuron, ranked.decoded),
        )
        yield "activity", activity_table(self.module_widths, self.sums)
        for part in example_tables(self.sums, self.widths):
            yield "examples", part
