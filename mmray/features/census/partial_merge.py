"""The merge of a large run as jobs, whose units are ranges: of shards for rows, of neurons, and of concepts.

    sums             totals, activity and examples of a range of neurons, over all shards in order
    rows             rows of the shards' tables, in order; where each concept occurs
    rankings         a range of concepts over all shards in order, given the totals
    neuron_concepts  the rankings of a range of neurons

Each unit commits files of tables, whose rows are those of an undivided merge, and what the next jobs need. The driver
puts the files together.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmray.engine import Job, Output, Parts, Plan, Unit, UnitResult, Worker
from mmray.engine.job import PARTIAL
from mmray.errors import InputError
from mmray.features.census.bytes_written import PER_NEURON
from mmray.features.census.concept_merge import ConceptMerge
from mmray.features.census.concept_rankings import BY_NEURON, INDEX, ConceptRankings, sorted_by_neuron, uses_of
from mmray.features.census.merging import APPENDED, RANGE, concept_cuts, read_decoded
from mmray.features.census.neuron_sums import NeuronSums, Samples, activity_table, example_tables, neuron_table
from mmray.features.census.ranges import cuts_in, is_cut, neuron_ranges, pieces_of, pieces_within
from mmray.features.census.ranking import neuron_names
from mmray.features.census.settings import CensusSettings
from mmray.features.census.spill import ScratchFile, cuts_of
from mmray.features.census.tables import PARTS, TABLES
from mmray.neuron_names import NeuronNames
from mmray.runs import Receipt, RunFolder
from mmray.runs.concepts import summarise_rankings
from mmray.runs.pieces import TableCutter, cut_rows, in_pieces, join, piece
from mmray.runs.receipts import receipts_digest
from mmray.runs.snapshots import FILE_BYTES
from mmray.runs.tables import list_column, list_values
from mmray.version import VERSION

LARGE = 4 << 30
"""Bytes of parts from which ranges are merged by workers: a minute's work, against seconds to start them."""
ROWS_EACH = 64 << 20
"""Bytes of committed rows of a unit of `rows`; several times as many in memory."""
CONCEPTS_EACH = 256 << 20
"""Bytes of committed sums of a unit of `rankings`, at least: a unit has whole pieces of the shards."""
USES_PIECE = 2 << 20
"""Bytes in memory of a piece of the rows that say where concepts occur."""

SUMS = pa.schema(
    [
        ("n", pa.int64()),
        ("score", pa.list_(pa.float64())),
        ("score_squares", pa.list_(pa.float64())),
        ("max", pa.list_(pa.float32())),
        ("min", pa.list_(pa.float32())),
    ]
)
"""What a range of neurons has in total, in one row."""
COUNTS = pa.schema(
    [("ranked", pa.int64()), ("certified", pa.int64()), ("among", pa.int64()), ("top", pa.list_(pa.int64()))]
)
"""What the headline, and the table `neurons`, say about a range of concepts, in one row."""


@dataclass(frozen=True)
class MergeContext:
    """What the workers of a partial merge need."""

    run: str
    shards: tuple[int, ...]
    """Those to merge: one that is quarantined may be committed meanwhile."""
    widths: tuple[int, ...]
    names: NeuronNames
    decoding: str
    """Folder of the decoded neurons."""
    starts: tuple[int, ...]
    """First neuron of each range."""
    cuts: tuple[str, ...]
    """Concepts at which a unit's concepts are cut once more, to bound its memory."""
    earlier: Mapping[str, str]
    """Folders of the jobs before this one, by name."""

    def parts(self) -> Parts:
        """Return the parts of the shards."""
        folder = RunFolder.at(self.run)
        receipts = folder.receipts()
        if missing := [number for number in self.shards if number not in receipts]:
            raise InputError(f"{self.run}: shard {missing[0]} is gone; run the same command again")
        return Parts(folder, {number: receipts[number] for number in self.shards}, PARTS)

    def made_by(self, name: str) -> Parts:
        """Return the parts of an earlier job."""
        return committed(self.earlier[name])


def committed(uri: str) -> Parts:
    """Return the parts in a folder of units."""
    folder = RunFolder.at(uri)
    return Parts(folder, folder.receipts(), {})


Pieces = Iterable[tuple[str, pa.Table]]
"""Rows of tables, in order."""


class PartialMerge(Job[CensusSettings, MergeContext]):
    """A job of the merge; needs no model and no GPU."""

    parts: ClassVar[Mapping[str, pa.Schema]] = {}

    def __init__(self, settings: CensusSettings, context: MergeContext, units: Sequence[Unit], made_from: str) -> None:
        """Take the digest of what is merged, and of how it is cut."""
        # Another call tries units again that failed three times: without them there is no table.
        execution = {"gpus_per_worker": 0, "retry_failed": True, "unit_timeout": None}
        super().__init__(settings.model_copy(update=execution))
        self.context = context
        self.units = units
        self.made_from = made_from

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.out

    @property
    def root(self) -> str:
        """A folder that is removed after the merge."""
        return f"{self.target}/{PARTIAL}/{self.name}"

    @property
    def place(self) -> str:
        """Folder of its units."""
        return self.folder(self.settings.fingerprint(self.plan().digests))

    def plan(self) -> Plan[MergeContext]:
        """Return the plan that it was made with."""
        return Plan(self.units, {"merge": self.made_from, "version": VERSION}, self.context)

    @abstractmethod
    def merger(self, context: MergeContext) -> Callable[[Any], dict[str, pa.Table]]:
        """Return what merges a range, given as a unit's payload."""

    def worker(self, context: MergeContext) -> Worker:
        """Return what turns a range into its parts."""
        merge = self.merger(context)
        return lambda unit: UnitResult(merge(unit.payload))

    def merge(self, plan: Plan[MergeContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Make no table: the census's own merge does."""
        return {}


class RowMerge(PartialMerge):
    """Joins the rows of some shards, and collects where each concept occurs."""

    name = "rows"

    def merger(self, context: MergeContext) -> Callable[[tuple[int, int]], dict[str, pa.Table]]:
        """Return what merges shards, given the places of the first and the one after the last."""
        parts = context.parts()

        def merge(shards: tuple[int, int]) -> dict[str, pa.Table]:
            own = replace(parts, receipts=dict(list(parts.receipts.items())[slice(*shards)]))
            uses: list[pa.Table] = []

            def rows() -> Pieces:
                for shard in own.by_unit(APPENDED):
                    uses.append(uses_of(shard["occurrences"], Samples.of(shard["captions"]), context.widths))
                    yield from shard.items()

            files = table_files(APPENDED, rows())
            of_concepts = pa.concat_tables(uses).combine_chunks().sort_by("concept")
            return files | in_pieces("uses", cut_rows(of_concepts, "concept", USES_PIECE))

        return merge


class SumMerge(PartialMerge):
    """Adds up all shards for a range of neurons."""

    name = "sums"

    def merger(self, context: MergeContext) -> Callable[[tuple[int, int, int]], dict[str, pa.Table]]:
        """Return what merges neurons, given the number of the range, its first neuron and how many it has."""
        parts = context.parts()

        def merge(neurons: tuple[int, int, int]) -> dict[str, pa.Table]:
            number, first, count = neurons
            sums, totals = NeuronSums(count, first), ConceptMerge(count)
            names = [*(piece(name, number) for name in PER_NEURON), "captions"]
            for pieces in parts.by_unit(names, {"captions": Samples.COLUMNS}):
                shard = join(pieces)
                totals.add_totals(shard["totals"])
                sums.add(shard["activity"], shard["examples"], Samples.of(shard["captions"]))
            extremes = (sums.examples[sign].extreme() for sign in (1, -1))
            columns = [
                list_column(values[None], kind)
                for values, kind in zip((totals.total, totals.total_squares, *extremes), SUMS.types[1:], strict=True)
            ]
            found = {"sums": pa.Table.from_arrays([pa.array([totals.n]), *columns], schema=SUMS)}
            found["activity"] = sums.table()
            rows = (("examples", rows) for rows in example_tables(sums, context.widths))
            return found | table_files(["examples"], rows)

        return merge


class RankingMerge(PartialMerge):
    """Ranks a range of concepts."""

    name = "rankings"

    def merger(self, context: MergeContext) -> Callable[[tuple[str, str | None]], dict[str, pa.Table]]:
        """Return what merges concepts, given the first and the one after the last."""
        parts, occurring, neurons = context.parts(), context.made_by("rows"), sum(context.widths)
        decoded, totals = read_decoded(context.decoding), whole(context.made_by("sums"), "sums")
        scratch = ScratchFile()

        def merge(concepts: tuple[str, str | None]) -> dict[str, pa.Table]:
            first, end = concepts
            cuts = [name for name in context.cuts if first < name and (end is None or name < end)]
            sums = ConceptMerge(neurons, cuts, scratch)
            sums.add_totals(totals, shards=len(parts.receipts))
            ranked = ConceptRankings(sums, cuts, context.widths, decoded, self.settings.top_k, context.names)
            for table in rows_within(parts, "concepts", first, end):
                sums.add_concepts(table)
            for table in rows_within(occurring, "uses", first, end):
                ranked.uses.add(table, "concept")
            by_neuron = [BY_NEURON.empty_table()]

            def rows() -> Pieces:
                for rankings, own in ranked.tables():
                    by_neuron.append(own)
                    yield "rankings", rankings
                    yield "concepts", summarise_rankings(rankings)

            files = table_files(["rankings", "concepts"], rows())
            counts = [pa.array([value]) for value in (ranked.ranked, *ranked.certified)]
            top = list_column(ranked.concepts_per_neuron[None], COUNTS.types[-1])
            return (
                files
                | {"counts": pa.Table.from_arrays([*counts, top], schema=COUNTS)}
                | in_pieces("by_neuron", cut_at(pa.concat_tables(by_neuron), INDEX.name, context.starts))
            )

        return merge


class NeuronConceptMerge(PartialMerge):
    """Regroups the rankings by neuron, for a range of neurons."""

    name = "neuron_concepts"

    def merger(self, context: MergeContext) -> Callable[[int], dict[str, pa.Table]]:
        """Return what merges neurons, given the number of their range."""
        rankings = context.made_by("rankings")

        def merge(number: int) -> dict[str, pa.Table]:
            rows = [one for unit in rankings.by_unit([piece("by_neuron", number)]) for one in unit.values()]
            return table_files([self.name], [(self.name, sorted_by_neuron(pa.concat_tables(rows)))])

        return merge


def partial_merges(
    settings: CensusSettings,
    parts: Parts,
    widths: tuple[int, ...],
    module_widths: Mapping[str, Sequence[int]],
    names: NeuronNames,
    decoding: str,
) -> list[list[PartialMerge]]:
    """Return the jobs that merge a run, by step, each of which needs those before it; none if the run is small.

    A run of which some shards were committed whole, by an earlier version, is merged by the driver alone.
    """
    receipts = list(parts.receipts.values())
    if sum(map(parts.size, PARTS)) < LARGE or not all(map(is_cut, receipts)):
        return []
    size = parts.size("concepts")
    within = concept_cuts(parts, -(-size // RANGE))
    # Where the shards are cut, so that units read no piece twice.
    of_shards = cuts_in(receipts[0])
    cuts = cuts_of(of_shards, max(1, min(-(-size // CONCEPTS_EACH), len(of_shards) + 1)))
    ranges = neuron_ranges([widths, *module_widths.values()])
    starts = [first for first, _ in ranges]
    by_step: list[dict[type[PartialMerge], list[Any]]] = [
        # The long units first, so that short ones fill the end, when some workers have none left.
        {
            SumMerge: [(number, *one) for number, one in enumerate(ranges)],
            RowMerge: list(pairwise(_row_edges(receipts))),
        },
        {RankingMerge: list(pairwise(["", *cuts, None]))},
        {NeuronConceptMerge: list(range(len(ranges)))},
    ]
    # Units that were cut in another way are not these.
    known = [receipts_digest(parts.receipts), settings.merge_settings(), [list(units.values()) for units in by_step]]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    steps: list[list[PartialMerge]] = []
    for units in by_step:
        context = MergeContext(
            parts.folder.store.uri,
            tuple(parts.receipts),
            widths,
            names,
            decoding,
            tuple(starts),
            tuple(within),
            earlier={job.name: job.place for step in steps for job in step},
        )
        steps.append(
            [kind(settings, context, [Unit(1, each) for each in payloads], digest) for kind, payloads in units.items()]
        )
    return steps


def put_together(
    steps: Sequence[Sequence[PartialMerge]], module_widths: Mapping[str, Sequence[int]], output: Output
) -> tuple[int, int, int]:
    """Write the run's tables from what the jobs of these steps have committed.

    Returns how many concepts there are, and the counts of `certified_counts`.
    """
    made = {job.name: committed(job.place) for step in steps for job in step}
    for name in TABLES.keys() - {"neurons", "activity"}:
        files = [
            (parts, receipt, part)
            for parts in made.values()
            for receipt in parts.receipts.values()
            for part in pieces_of(receipt, name)
            if part != name and (receipt.checksums or {})[part].rows
        ]
        if files:
            output.table_files(name, files)
        else:
            output.table(name, TABLES[name].empty_table())
    context = steps[0][0].context
    totals, sums = whole(made["sums"], "sums"), NeuronSums.of(whole(made["sums"], "activity"))
    extremes = {name: list_values(totals[name])[0] for name in ("max", "min")}
    counts = pa.concat_tables(made["rankings"].each("counts"))
    top = np.sum(list_values(counts["top"]), axis=0)
    ranked, certified, among = (pc.sum(counts[name]).as_py() for name in COUNTS.names[:3])
    names, decoded = neuron_names(context.widths, context.names), read_decoded(context.decoding)
    output.table("neurons", neuron_table(context.widths, names, sums, extremes, top, decoded))
    output.table("activity", activity_table({"language": context.widths, **module_widths}, sums))
    return ranked, certified, among


def whole(parts: Parts, name: str) -> pa.Table:
    """Return a part whose units are ranges of neurons, with lists over all neurons."""
    return join({piece(name, number): table for number, table in enumerate(parts.each(name))})[name]


def rows_within(parts: Parts, name: str, first: str, end: str | None) -> Iterator[pa.Table]:
    """Yield each unit's rows of a part that is sorted by concept, from `first` to before `end`."""
    for pieces in parts.by_unit(lambda receipt: pieces_within(receipt, name, first, end)):
        for rows in join(pieces).values():
            last = [] if end is None else [end]
            edges = np.searchsorted(rows["concept"].to_numpy(), [first, *last]).tolist()
            yield rows.slice(edges[0], edges[1] - edges[0] if last else None)


def cut_at(rows: pa.Table, key: str, starts: Sequence[int]) -> list[pa.Table]:
    """Return the rows of each range of a key, in their order; ranges begin with these."""
    place = np.searchsorted(starts, rows[key].to_numpy(), side="right") - 1
    return [rows.filter(place == number) for number in range(len(starts))]


def table_files(names: Sequence[str], rows: Pieces) -> dict[str, pa.Table]:
    """Return tables as the pieces that become their files."""
    cutters = {name: TableCutter(TABLES[name], FILE_BYTES) for name in names}
    found: dict[str, list[pa.Table]] = {name: [] for name in names}
    for name, table in rows:
        found[name] += cutters[name].add(table)
    return {
        part: piece
        for name, cutter in cutters.items()
        for part, piece in in_pieces(name, [*found[name], *([] if cutter.empty else [cutter.rest()])]).items()
    }


def _row_edges(receipts: Sequence[Receipt]) -> list[int]:
    """Return where to cut shards into groups with about ROWS_EACH bytes of rows, at least one shard in each."""
    edges, size = [0], 0
    for number, receipt in enumerate(receipts, 1):
        size += sum((receipt.checksums or {})[name].size for name in APPENDED)
        if size >= ROWS_EACH or number == len(receipts):
            edges.append(number)
            size = 0
    return edges
