"""The tables of a run from the committed parts of its shards: sums, maxima and top-k, in the order of the shards.

Everything is recomputed from committed parts, so the number of workers, crashes and resumes cannot change the tables.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Shaped, UInt64
from numpy import ndarray

from mmray.engine import Parts
from mmray.features.census.activity import ActivityKey, activity_lists
from mmray.features.census.concept_merge import AddUp, ConceptMerge
from mmray.features.census.ranking import (
    NO_USES,
    RankedNeurons,
    Uses,
    certified_counts,
    locate_index,
    neuron_names,
    rank_concept,
    ranking_table,
)
from mmray.features.census.spill import Spill, cuts_of
from mmray.features.census.tables import TABLES
from mmray.neuron_names import PLAIN, NeuronNames
from mmray.neurons.statistics import EXAMPLES
from mmray.runs.concepts import summarise_rankings
from mmray.runs.tables import list_values

ReadPart = Callable[[str], pa.Table]
"""Reads one part (`captions`, `concepts`, …) of a committed shard."""

APPENDED = ("captions", "occurrences", "errors")
"""Tables that are the concatenated rows of all shards."""


USES = pa.schema([("concept", pa.string()), ("image", pa.uint64()), ("neurons", pa.list_(pa.int32()))])
"""Columns that are kept of occurrences until their concept is ranked."""

INDEX = pa.field("index", pa.int64())
"""A neuron's place over all layers."""

RANGE = 64 << 20
"""Bytes of committed sums that a range of concepts has; bounds the memory of a merge."""
BLOCK = 1 << 15
"""Neurons whose examples are sorted, or become a table, at a time."""
TOGETHER = 16
"""Concepts whose rankings become a table at a time."""
RANKERS = 4
"""Threads that rank concepts, at most; each holds TOGETHER concepts. Most of their work is NumPy's, outside the GIL."""
SAMPLED = 32
"""Shards whose concepts decide where ranges are cut."""


def concept_cuts(parts: Parts) -> list[str]:
    """Return the concepts at which to cut the run's concepts into ranges of about RANGE bytes of sums."""
    ranges = -(-parts.size("concepts") // RANGE)
    # The shards are spread over the run: its end may be in another language than its beginning.
    sampled = parts.sample("concepts", SAMPLED) if ranges > 1 else ()
    return cuts_of([name for part in sampled for name in part["concept"].to_pylist()], ranges)


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
        self.neurons = sum(widths)
        self.decoded = decoded
        self.top_k = top_k
        self.concepts = ConceptMerge(self.neurons, cuts)
        self.activity: dict[ActivityKey, list[ndarray]] = {}
        self.tokens: dict[ActivityKey, int] = {}
        self.examples = {sign: Examples(sign, self.neurons) for sign in (1, -1)}
        self.names = neuron_names(widths, names)
        self.uses = Spill(USES, cuts)
        """Image and top-k neurons of every occurrence."""
        # As many ranges of neurons as of concepts: `neuron_concepts` has the rows of `rankings`, in another order.
        starts = [self.neurons * number // (len(cuts) + 1) for number in range(1, len(cuts) + 1)]
        self.by_neuron = Spill(TABLES["neuron_concepts"].append(INDEX), starts)
        """Rankings, regrouped by neuron."""
        self.ranked = 0
        """Concepts in `rankings`."""
        self.certified = [0, 0]
        """See `certified_counts`."""
        self._concepts_per_neuron = np.zeros(self.neurons, np.int64)
        self._layer, self._unit = locate_index(widths, np.arange(self.neurons))

    def add(self, read: ReadPart) -> dict[str, pa.Table]:
        """Add one shard, and return its rows of the appended tables."""
        rows = {name: read(name) for name in APPENDED}
        self.concepts.add(read("concepts"), read("totals"))
        self._add_activity(read("activity"))
        # Parts name samples by their row in captions, so these arrays are needed before examples and occurrences.
        captions = rows["captions"]
        samples = Samples(
            np.array(captions["sample_id"].to_pylist(), object),
            _image_numbers(captions),
            captions["shard_id"].to_numpy(),
        )
        self._add_examples(read("examples"), samples)
        self._add_occurrences(rows["occurrences"], dict(zip(samples.sample_id, samples.image, strict=True)))
        return rows

    def tables(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield the tables made from sums, most of them in pieces."""
        # What was read of the shards is free, but Arrow keeps it for itself.
        pa.default_memory_pool().release_unused()
        for name in ("rankings", "concepts", "neuron_concepts"):
            yield name, TABLES[name].empty_table()
        for rankings in self.rankings():
            yield "rankings", rankings
            yield "concepts", summarise_rankings(rankings)
        for rows in self.by_neuron.ranges():
            # The index orders neurons by layer and unit, as the schema of the table promises.
            keys = [(INDEX.name, "ascending"), ("rank", "ascending"), ("score", "descending")]
            yield "neuron_concepts", rows.sort_by(keys).drop_columns(INDEX.name)
        yield "neurons", self.neuron_table()
        yield "activity", self.activity_table()
        for first in range(0, self.neurons, BLOCK):
            part = slice(first, first + BLOCK)
            yield "examples", example_table(list(self.examples.values()), self._layer, self._unit, part)

    def rankings(self) -> Iterator[pa.Table]:
        """Yield the concepts' rankings, concepts in alphabetical order."""
        threads = min(RANKERS, os.cpu_count() or 1)
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

    def _counted(self, ranked: Sequence[RankedNeurons], rankings: pa.Table) -> pa.Table:
        """Take in what other tables, and the headline, say about these rankings, and return them."""
        for one in ranked:
            # Its top neurons are different ones, so that each is counted: numpy would add to a repeated index once.
            self._concepts_per_neuron[one.top] += 1
        self.ranked += len(ranked)
        self.certified = list(map(sum, zip(self.certified, certified_counts(rankings), strict=True)))
        index = np.concatenate([one.neuron for one in ranked])
        self.by_neuron.add(
            rankings.select(TABLES["neuron_concepts"].names).append_column(INDEX, pa.array(index)), INDEX.name
        )
        return rankings

    def neuron_table(self) -> pa.Table:
        """Return one row per neuron: its activity over all counted tokens, and the tokens it writes."""
        # The label "all" is every sample's; its modalities, image and text, add up to all tokens.
        of_all = [sums for key, sums in self.activity.items() if key[:2] == ("language", "all")]
        active, total, squares = np.sum(of_all, axis=0) if of_all else np.zeros((3, self.neurons))
        tokens = sum(count for key, count in self.tokens.items() if key[:2] == ("language", "all"))
        mean = total / max(tokens, 1)
        return pa.table(
            {
                "layer": self._layer,
                "unit": self._unit,
                "neuron": self.names,
                "n_concepts": self._concepts_per_neuron,
                "n_tokens": np.full(self.neurons, tokens),
                "n_active": active.astype(np.int64),
                "mean": mean,
                "std": np.sqrt(np.maximum(0, squares / max(tokens, 1) - mean**2)),
                "max": self.examples[1].extreme(),
                "min": self.examples[-1].extreme(),
                "tokens": self.decoded["tokens"],
                "suppressed": self.decoded["suppressed"],
            },
            schema=TABLES["neurons"],
        )

    def activity_table(self) -> pa.Table:
        """Return one row per module, label, modality and neuron."""
        tables = [TABLES["activity"].empty_table()]
        for key, (active, total, squares) in sorted(self.activity.items()):
            constants = dict(zip(("module", "label_kind", "label", "modality"), key, strict=True))
            widths = self.module_widths[key[0]]
            neurons = sum(widths)
            layer, unit = locate_index(widths, np.arange(neurons))
            tables.append(
                pa.table(
                    {
                        **{name: pa.repeat(value, neurons) for name, value in constants.items()},
                        "layer": layer,
                        "unit": unit,
                        "n_tokens": np.full(neurons, self.tokens[key]),
                        "n_active": active.astype(np.int64),
                        "sum": total,
                        "sum_squares": squares,
                    },
                    schema=TABLES["activity"],
                )
            )
        return pa.concat_tables(tables)

    def _add_occurrences(self, occurrences: pa.Table, images: Mapping[str, np.uint64]) -> None:
        lists = occurrences["neurons"].combine_chunks()
        entries, starts = lists.flatten(), np.cumsum([0, *self.widths])
        neurons = starts[entries.field("layer").to_numpy()] + entries.field("unit").to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())])
        columns = {
            "concept": occurrences["concept"],
            "image": np.array([images[name] for name in occurrences["sample_id"].to_pylist()], np.uint64),
            "neurons": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(neurons, pa.int32())),
        }
        self.uses.add(pa.table(columns, schema=USES), "concept")

    def _add_activity(self, rows: pa.Table) -> None:
        for (key, numbers), tokens in zip(activity_lists(rows).items(), rows["n_tokens"].to_pylist(), strict=True):
            self.tokens[key] = self.tokens.get(key, 0) + tokens
            if key not in self.activity:
                self.activity[key] = [np.zeros(len(part)) for part in numbers]
            # In place: with many labels these arrays are the largest part of the merge.
            for total, added in zip(self.activity[key], numbers, strict=True):
                total += added

    def _add_examples(self, rows: pa.Table, samples: Samples) -> None:
        """Add a shard's extremes, whose column `sample` is the row in its captions."""
        signs = rows["sign"].to_numpy()
        activation, sample, position = (list_values(rows[name]) for name in ("activation", "sample", "position"))
        for sign, examples in self.examples.items():
            ranks = np.flatnonzero(signs == sign)
            if len(ranks):
                own = [[values[rank] for rank in ranks] for values in (activation, sample, position)]
                examples.add(own[0], own[1], own[2], samples)


@dataclass(frozen=True)
class Samples:
    """The samples of a shard, in order of its captions."""

    sample_id: Shaped[ndarray, " sample"]
    image: UInt64[ndarray, " sample"]
    """A number that samples of one image share."""
    shard_id: Shaped[ndarray, " sample"]


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


class Examples:
    """The most extreme samples of every neuron on one side, [rank, neuron], each of a different image."""

    def __init__(self, sign: int, neurons: int) -> None:
        self.sign = sign
        self.activation = np.full((EXAMPLES, neurons), -sign * np.inf, np.float32)
        self.position = np.zeros((EXAMPLES, neurons), np.int32)
        self.image = np.zeros((EXAMPLES, neurons), np.uint64)
        self.sample_id = np.zeros((EXAMPLES, neurons), object)
        self.shard_id = np.zeros((EXAMPLES, neurons), np.int32)

    def add(
        self, activation: Sequence[ndarray], sample: Sequence[ndarray], position: Sequence[ndarray], of: Samples
    ) -> None:
        """Add one shard's ranks, each a row over all neurons; of equal activations that of the earlier shard is higher.

        A shard has the highest sample of each of its EXAMPLES highest images, so the result is that of all samples.
        """
        # Late in a long run, few neurons have a new extreme in a shard.
        changed = np.flatnonzero(self.sign * activation[0] > self.sign * self.activation[-1])
        for first in range(0, len(changed), BLOCK):
            part = changed[first : first + BLOCK]
            new, index, places = (
                np.stack([values[part] for values in rows]) for rows in (activation, sample, position)
            )
            self._add(part, (new, places, of.image[index], of.sample_id[index], of.shard_id[index]))

    def _add(self, neurons: Int64[ndarray, " neuron"], added: tuple[ndarray, ...]) -> None:
        """Add samples to some neurons: activation, position, image, sample id and shard, each [rank, neuron]."""
        held: tuple[ndarray, ...] = (self.activation, self.position, self.image, self.sample_id, self.shard_id)
        grown = [np.vstack([old[:, neurons], values]) for old, values in zip(held, added, strict=True)]
        order = np.argsort(-self.sign * grown[0], axis=0, kind="stable")
        ranked, image = (np.take_along_axis(values, order, 0) for values in (grown[0], grown[2]))
        # Of several samples of one image only the highest stays; the others sink below every finite activation.
        lower = np.stack([(image[:rank] == image[rank]).any(axis=0) for rank in range(len(image))])
        ranked[lower] = -self.sign * np.inf
        again = np.argsort(-self.sign * ranked, axis=0, kind="stable")[:EXAMPLES]
        order = np.take_along_axis(order, again, 0)
        for old, values in zip(held, grown, strict=True):
            old[:, neurons] = np.take_along_axis(values, order, 0)
        self.activation[:, neurons] = np.take_along_axis(ranked, again, 0)

    def extreme(self) -> ndarray:
        """Return each neuron's highest (lowest) activation, 0 if it has none."""
        return np.where(np.isfinite(self.activation[0]), self.activation[0], np.float32(0))


def example_table(sides: Sequence[Examples], layer: ndarray, unit: ndarray, part: slice) -> pa.Table:
    """Return one row per neuron, side and rank, in this order, for neurons of this part with a counted token."""
    layer, unit = layer[part], unit[part]

    def joined(name: str) -> ndarray:
        return np.stack([getattr(one, name)[:, part] for one in sides], axis=1).transpose(2, 1, 0)

    # Ranks without a sample still have the infinite start value.
    neurons, side, ranks = kept = np.nonzero(np.isfinite(joined("activation")))
    return pa.table(
        {
            "layer": layer[neurons],
            "unit": unit[neurons],
            "sign": np.array([one.sign for one in sides], np.int8)[side],
            "rank": ranks + 1,
            "sample_id": pa.array(joined("sample_id")[kept], pa.string()),
            **{name: joined(name)[kept] for name in ("position", "activation", "shard_id")},
        },
        schema=TABLES["examples"],
    )


def _image_numbers(captions: pa.Table) -> UInt64[ndarray, " sample"]:
    """Return a number per row of `captions` that rows of one image share; a sample without an image has its own.

    They are 64 bits of digests, so no list of all images has to be kept.
    """
    sample_ids = captions["sample_id"].to_pylist()
    # Runs of earlier versions have no column `image`.
    images = captions["image"].to_pylist() if "image" in captions.column_names else [None] * len(sample_ids)
    return np.array(
        [
            # The zero byte keeps a sample id from looking like the bytes of an image.
            int(image or hashlib.sha256(b"\0" + sample_id.encode()).hexdigest()[:16], 16)
            for sample_id, image in zip(sample_ids, images, strict=True)
        ],
        np.uint64,
    )
