"""Open a run and ask it things: rankings, neurons, any table, SQL over all of them."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import DamagedError, InputError
from mmray.features import FEATURES, command_for, table_schemas
from mmray.neuron_names import parse_neuron
from mmray.runs import RunFolder
from mmray.runs.home import resolve_settings
from mmray.runs.lease import Driver, last_driver
from mmray.runs.receipts import NOTHING, Cost, cost, receipts_digest, skipped
from mmray.runs.snapshots import Snapshot, newest, open_snapshot, snapshots
from mmray.runs.tables import read_table

ORDERS = {
    "score": ("rank", "ascending"),
    "specific": ("specific_rank", "ascending"),
    "selective": ("selective_rank", "ascending"),
    "share": ("share", "descending"),
}
"""Column and direction that each `by` sorts a ranking by; ties go to the better rank."""
CERTIFICATES = {"score": "certified", "specific": "certified_specific", "selective": "certified_selective"}
"""Column that says, of each `by` that has such a certificate, whether a rank is certain."""
CENSUS = "census"
"""Name of the job that writes a run's first tables."""
READERS = 16
"""Parts that are read at once."""
PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d[\d,.]*")
"""What tells the message of one failed sample from that of another which failed for the same reason."""


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    shards: int
    shards_done: int
    quarantined: dict[int, str]
    samples: int
    samples_done: int
    failures: int
    skipped: dict[str, int]
    """Samples that were counted and kept, but have nothing to rank neurons for, by reason; these are no failures."""
    seconds: float
    finished: bool
    certified: float | None = None
    """Part of the ten highest ranks by score, of concepts of five occurrences and more, that is certified."""
    cost: Cost = NOTHING
    """What it took."""
    driver: Driver | None = None
    """Who drives it, or did last."""

    @property
    def pending(self) -> int:
        """Shards that are neither done nor quarantined."""
        return self.shards - self.shards_done - len(self.quarantined)

    @property
    def samples_per_second(self) -> float:
        """Samples a second of a worker's time."""
        return self.samples_done / self.seconds if self.seconds else 0.0


class Run:
    """A run in a local folder or on S3; tables are read when asked for, and kept."""

    def __init__(self, uri: str | Path) -> None:
        self.folder = RunFolder.at(uri)
        info = self.folder.info()
        if info is None:
            raise InputError(f"{uri}: no run here (no run.json); give a folder that mmray census wrote")
        info["settings"] = resolve_settings(info["settings"], info.get("home", "."))
        self.uri = self.folder.store.uri
        self.info: dict[str, Any] = info
        self._tables: dict[str, pa.Table] = {}

    def table(self, name: str) -> pa.Table:
        """Return one of the run's tables; raises InputError for an unknown one or a run without its tables yet."""
        if name not in (known := table_schemas()):
            raise InputError(f"unknown table {name!r}; a run has {', '.join(known)}")
        if name not in self._tables:
            try:
                self._tables[name] = self._read(name)
            except DamagedError as error:
                raise InputError(str(error)) from error
            except FileNotFoundError:
                why = (
                    "the census has not ended: run it again to resume"
                    if name in FEATURES[CENSUS].tables
                    else f"make it: {command_for(name)}"
                )
                raise InputError(f"{self.uri}: no table {name!r} yet; {why}") from None
        return self._tables[name]

    def optional(self, name: str) -> pa.Table | None:
        """Return a table that not every run has; None where this one has not."""
        if name not in self._snapshots and not self.folder.store.list(f"tables/{name}.parquet"):
            return None
        return self.table(name)

    def digests(self) -> dict[str, str]:
        """Return what tells the run's finished tables from those of any other run, or of the same one grown."""
        snapshot = self.snapshot
        return {"run": self.info["fingerprint"], "receipts": snapshot.made_from["receipts"] if snapshot else "None"}

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest version of the census's tables; None where no merge has ended yet."""
        return newest(self.folder.store, CENSUS)

    @cached_property
    def _snapshots(self) -> dict[str, Snapshot]:
        """The newest snapshot of every analysis by table, all of this moment."""
        store = self.folder.store
        opened = [open_snapshot(store, job, numbers[0]) for job, numbers in snapshots(store).items()]
        return {name: snapshot for snapshot in opened for name in snapshot.tables}

    def properties(self, concept: str | None = None) -> pa.Table:
        """Return what `mmray properties` measured, of a concept or over all of them (None); columns of `properties`.

        Raises InputError where nothing has been measured yet. (`mmray.properties(run)` measures.)
        """
        table = self.table("properties")
        column = table["concept"]
        return table.filter(pc.is_null(column) if concept is None else pc.equal(column, concept.casefold()))

    def _read(self, name: str) -> pa.Table:
        if name in self._snapshots:
            return self._snapshots[name].read(self.folder.store, name)
        # Of a run whose tables an earlier version of mmray, or another program, has written.
        try:
            return read_table(self.folder.store, name)
        except DamagedError as error:
            by_census = name in FEATURES[CENSUS].tables
            remedy = "the same census makes it again" if by_census else f"make it again: {command_for(name)}"
            raise DamagedError(f"{error}; {remedy}") from error

    def sql(self, query: str) -> pa.Table:
        """Return the answer of DuckDB to a query over the run's tables, by their names."""
        import duckdb

        with duckdb.connect() as connection:
            connection.execute("SET enable_external_access = false")
            for name in table_schemas():
                if name in query.casefold():
                    connection.register(name, self.table(name))
            try:
                answer = connection.sql(query)
                return pa.table({}) if answer is None else answer.to_arrow_table()
            except duckdb.Error as error:
                raise InputError(f"SQL: {str(error).splitlines()[0]}") from error

    @cached_property
    def concepts(self) -> dict[str, int]:
        """Every concept with its number of occurrences, most frequent first."""
        counts = self.table("occurrences")["concept"].value_counts().to_pylist()
        return {row["values"]: row["counts"] for row in sorted(counts, key=lambda row: (-row["counts"], row["values"]))}

    def concept_table(self, by: str = "score") -> pa.Table:
        """Return every concept, most frequent first: concept, occurrences, images, and its highest neuron by `by`."""
        _check_order(by)
        occurrences = self.table("occurrences").select(["sample_id", "concept"])
        captions = self.table("captions")
        # Runs of earlier versions, and samples of text alone, have no image to tell from others.
        named = captions["sample_id"]
        image = pc.coalesce(captions["image"], named) if "image" in captions.column_names else named
        images = dict(zip(named.to_pylist(), image.to_pylist(), strict=True))
        seen: dict[str, set[str]] = defaultdict(set)
        for sample, concept in zip(*(occurrences[name].to_pylist() for name in occurrences.column_names), strict=True):
            seen[concept].add(images.get(sample, sample))
        rankings = self.table("rankings")
        column, direction = ORDERS[by]
        ordered = rankings.select(["concept", "neuron", "rank", *{column} - {"rank"}]).sort_by(
            [(column, direction), ("rank", "ascending")]
        )
        first: dict[str, str] = {}
        for concept, neuron in zip(ordered["concept"].to_pylist(), ordered["neuron"].to_pylist(), strict=True):
            first.setdefault(concept, neuron)
        return pa.table(
            {
                "concept": pa.array(list(self.concepts), pa.string()),
                "occurrences": pa.array(list(self.concepts.values()), pa.int64()),
                "images": pa.array([len(seen[concept]) for concept in self.concepts], pa.int64()),
                "neuron": pa.array([first.get(concept) for concept in self.concepts], pa.string()),
            }
        )

    def rank(self, concept: str, k: int = 10, by: str = "score") -> pa.Table:
        """Return the concept's k highest neurons by score, specific, selective or share; columns of `rankings`.

        Raises InputError for an unknown concept, with the nearest there are.
        """
        _check_order(by)
        rankings = self.table("rankings")
        name = concept.casefold()
        rows = rankings.filter(pc.equal(rankings["concept"], name))
        if not len(rows):
            near = difflib.get_close_matches(name, self.concepts, n=3) or list(self.concepts)[:3]
            raise InputError(f"no concept {concept!r} in {self.uri}; it has {', '.join(near)}, …")
        column, direction = ORDERS[by]
        return rows.sort_by([(column, direction), ("rank", "ascending")]).slice(0, k)

    def images(self, concept: str) -> int | None:
        """Return the number of different images of a concept's occurrences; None where the run does not tell."""
        rankings = self.table("rankings")
        if "n_images" not in rankings.column_names:
            return None
        counts = rankings["n_images"].filter(pc.equal(rankings["concept"], concept.casefold()))
        return counts[0].as_py() if len(counts) else None

    def neuron(self, name: str, examples: int = 5) -> dict[str, Any]:
        """Return what is known of a neuron: its row of `neurons`, its concepts, its extreme samples with captions."""
        layer, unit = parse_neuron(name)
        facts = _of(self.table("neurons"), layer, unit).to_pylist()
        if not facts:
            widths = self.info["model"]["widths"]
            raise InputError(f"{name} is outside the model: {len(widths)} layers of {max(widths)} neurons, from L0.u0")
        concepts = _of(self.table("rankings"), layer, unit).sort_by([("rank", "ascending"), ("score", "descending")])
        found = _of(self.table("examples"), layer, unit)
        found = found.filter(pc.less_equal(found["rank"], examples))
        captions = self.table("captions").select(["sample_id", "caption"])
        joined = found.join(captions, "sample_id", join_type="left outer").sort_by(
            [("sign", "descending"), ("rank", "ascending")]
        )
        columns = ["concept", "rank", "score", "specific", "specific_rank", "selective", "share", "n", "activation"]
        known: dict[str, Any] = facts[0] | {
            "concepts": concepts.select(columns).to_pylist(),
            "examples": joined.to_pylist(),
        }
        return known

    def status(self) -> Status:
        """Return how far the run is, from what is committed."""
        receipts = self.folder.receipts()
        done = list(receipts.values())
        snapshot = self.snapshot
        finished = snapshot is not None and snapshot.made_from["receipts"] == receipts_digest(receipts)
        return Status(
            shards=self.info["shards"],
            shards_done=len(done),
            quarantined=self.folder.reasons(receipts),
            samples=self.info["data"]["samples"],
            samples_done=sum(receipt.samples for receipt in done),
            failures=sum(receipt.failures for receipt in done),
            skipped=skipped(done),
            seconds=sum(receipt.seconds for receipt in done),
            finished=finished,
            certified=snapshot.headline["certified"] if snapshot else None,
            cost=cost(done),
            driver=last_driver(self.folder.store),
        )

    def failures(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Return the failed samples, or the first of them, with their reasons, from what is committed."""
        failed = [receipt for receipt in self.folder.receipts().values() if receipt.failures]
        with ThreadPoolExecutor(READERS) as pool:
            parts = pool.map(lambda receipt: self.folder.read_part(receipt, "errors"), failed[:limit])
            return [row for part in parts for row in part.to_pylist()][:limit]


@dataclass(frozen=True)
class Reason:
    """Why samples failed: the stage and message of the first, and where they all lie in the data."""

    stage: str
    message: str
    sources: tuple[str, ...]


def reasons(failures: Iterable[Mapping[str, Any]]) -> list[Reason]:
    """Return why samples failed, the most frequent first; messages that differ in names and numbers are one reason."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in failures:
        groups.setdefault((row["stage"], PARTICULARS.sub("…", row["message"])), []).append(row)
    found = [Reason(rows[0]["stage"], rows[0]["message"], tuple(r["source"] for r in rows)) for rows in groups.values()]
    return sorted(found, key=lambda reason: -len(reason.sources))


def open_run(uri: str | Path) -> Run:
    """Open a run; raises InputError where there is none.

    Relative paths in its settings become those of where it was begun.
    """
    return Run(uri)


def _check_order(by: str) -> None:
    if by not in ORDERS:
        raise InputError(f"--by {by}: order by {', '.join(ORDERS)}")


def _of(table: pa.Table, layer: int, unit: int) -> pa.Table:
    return table.filter(pc.and_(pc.equal(table["layer"], layer), pc.equal(table["unit"], unit)))
