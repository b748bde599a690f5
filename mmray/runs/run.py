"""Open a run and read its results: rankings, neurons, tables, SQL over them, and status."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.errors import DamagedError, InputError
from mmray.features import FEATURES, command_for, table_schemas
from mmray.neuron_names import NeuronNames
from mmray.runs import RunFolder
from mmray.runs.concepts import ORDERS, rankings_by_neuron, summarise_rankings
from mmray.runs.examples import example_rows
from mmray.runs.failures import committed_failures
from mmray.runs.home import resolve_settings
from mmray.runs.lease import Driver, last_driver
from mmray.runs.receipts import NO_COST, Cost, cost, receipts_digest, skipped
from mmray.runs.snapshots import Snapshot, newest, open_snapshot, snapshots
from mmray.runs.tables import read_table, with_columns

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection
    from pandas import DataFrame
    from plotly.graph_objects import Figure
    from pyarrow.dataset import Dataset

CERTIFICATES = {"score": "certified", "specific": "certified_specific", "selective": "certified_selective"}
"""Column with the certificate of each rank, for every `by` that has one."""
CENSUS = "census"
"""Name of the job that writes a run's first tables."""
FROM_RANKINGS = {"concepts": summarise_rankings, "neuron_concepts": rankings_by_neuron}
"""Tables that runs of earlier versions lack, and what makes them from `rankings`."""
WHOLE = 4 << 20
"""Bytes of a table up to which it is read whole, and all of it checked."""
SHOWN = 5
"""Concepts that a run shows when it is printed."""


@dataclass(frozen=True)
class Status:
    """Progress of a run's census."""

    shards: int
    shards_done: int
    quarantined: dict[int, str]
    samples: int
    samples_done: int
    failures: int
    skipped: dict[str, int]
    """Samples with nothing to rank neurons for, by reason; they are counted as done, and are no failures."""
    seconds: float
    finished: bool
    certified: float | None = None
    """Fraction of certified ranks among the top ten by score of concepts with at least five occurrences."""
    cost: Cost = NO_COST
    """Worker time and memory."""
    driver: Driver | None = None
    """The process that drives it, or did last."""

    @property
    def pending(self) -> int:
        """Shards neither done nor quarantined."""
        return self.shards - self.shards_done - len(self.quarantined)

    @property
    def samples_per_second(self) -> float:
        """Samples per second of worker time."""
        return self.samples_done / self.seconds if self.seconds else 0.0


class Run:
    """A run in a local folder or on S3; tables are read on first use and cached."""

    def __init__(self, uri: str | Path) -> None:
        self.folder = RunFolder.at(uri)
        info = self.folder.info()
        if info is None:
            raise InputError(f"{uri}: no run here (no run.json); give a folder that mmray census wrote")
        info["settings"] = resolve_settings(info["settings"], info.get("home", "."))
        self.uri = self.folder.store.uri
        self.info: dict[str, Any] = info
        self._tables: dict[str, pa.Table] = {}

    def __repr__(self) -> str:
        """Return what was analysed, the most frequent concepts and the tables, in a few lines."""
        samples = f"{self.info['data']['samples']:,} samples of {self.info['settings']['data']}"
        lines = [f"Run {self.uri}", f"model     {self.info['settings']['model']}", f"data      {samples}"]
        if "rankings" not in (tables := self.tables):
            return "\n".join([*lines, "The census has not ended: run it again to resume."])
        concepts = f"{len(self.concepts):,}, most frequent {', '.join(list(self.concepts)[:SHOWN])}"
        return "\n".join([*lines, f"concepts  {concepts}", f"tables    {', '.join(tables)}"])

    def _repr_html_(self) -> str:
        """Return the same for a notebook, with the highest neuron of each of these concepts."""
        text = f"<pre>{escape(repr(self))}</pre>"
        if "rankings" not in self.tables:
            return text
        table = self.concept_table().slice(0, SHOWN).to_pydict()
        rows = ["".join(f"<td>{escape(str(value))}</td>" for value in row) for row in zip(*table.values(), strict=True)]
        head = "".join(f"<th>{escape(name)}</th>" for name in table)
        return f"{text}<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    @cached_property
    def names(self) -> NeuronNames:
        """Names of the model's neurons."""
        return NeuronNames.of(self.info["model"].get("experts", ()))

    @property
    def tables(self) -> list[str]:
        """The tables that the run has."""
        return [name for name in table_schemas() if name in self._snapshots or self._loose(name)]

    def scan(self, name: str) -> Dataset:
        """Return a table as an Arrow dataset, which reads only the columns and row groups that a query asks for.

        Raises InputError like `table`.
        """
        from pyarrow.dataset import dataset

        return self._dataset(name) if self._is_large(name) else dataset(self.table(name))

    def to_pandas(self, name: str) -> DataFrame:
        """Return a table as a pandas data frame; raises InputError like `table`."""
        return self.table(name).to_pandas()

    def plot_layers(self, concept: str | None = None) -> Figure:
        """Return a plotly figure: the layers of the ten highest neurons of a concept, or of all.

        Raises InputError for an unknown concept.
        """
        from mmray.runs.figures import plot_layers

        # Through `rank`, for its error about an unknown concept.
        return plot_layers(self, concept and self.rank(concept, 1)["concept"][0].as_py())

    def plot_dose(self, concept: str | None = None, measure: str = "zeroed_own") -> Figure:
        """Return a plotly figure: a causal measure of `properties` by the number of neurons, with controls.

        Raises InputError if it was not measured: for this concept, or over all (None).
        """
        from mmray.runs.figures import plot_dose

        return plot_dose(self, concept and concept.casefold(), measure)

    def __len__(self) -> int:
        """Return the number of samples."""
        samples: int = self.info["data"]["samples"]
        return samples

    def table(self, name: str) -> pa.Table:
        """Return one of the run's tables; raises InputError for an unknown table, or one not made yet.

        Columns that the version which wrote it did not know are null.
        """
        if name not in (known := table_schemas()):
            raise InputError(f"unknown table {name!r}; a run has {', '.join(known)}")
        if name not in self._tables:
            try:
                self._tables[name] = with_columns(self._read(name), known[name])
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
        """Return a table, or None if this run doesn't have it."""
        return self.table(name) if name in self._snapshots or self._loose(name) else None

    def _loose(self, name: str) -> bool:
        """Return whether a table lies there without a snapshot, as earlier versions wrote them."""
        return bool(self.folder.store.list(f"tables/{name}.parquet"))

    def digests(self) -> dict[str, str]:
        """Return digests that identify the run's tables; a refresh changes them."""
        snapshot = self.snapshot
        return {"run": self.info["fingerprint"], "receipts": snapshot.made_from["receipts"] if snapshot else "None"}

    @property
    def snapshot(self) -> Snapshot | None:
        """The newest version of the census's tables; None before the first merge has finished."""
        return newest(self.folder.store, CENSUS)

    @cached_property
    def _snapshots(self) -> dict[str, Snapshot]:
        """Table → the newest snapshot that holds it; from one listing, so that tables fit together."""
        store = self.folder.store
        opened = [open_snapshot(store, job, numbers[0]) for job, numbers in snapshots(store).items()]
        return {name: snapshot for snapshot in opened for name in snapshot.tables}

    def properties(self, concept: str | None = None) -> pa.Table:
        """Return the rows of `properties` for a concept, or those over all concepts (None).

        Raises InputError if nothing has been measured yet. (`mmray.properties(run)` measures.)
        """
        table = self.table("properties")
        column = table["concept"]
        return table.filter(pc.is_null(column) if concept is None else pc.equal(column, concept.casefold()))

    def _read(self, name: str) -> pa.Table:
        if name in self._snapshots:
            return self._snapshots[name].read(self.folder.store, name)
        # Without a snapshot: tables written by an earlier version of mmray, or by another program.
        if name in FROM_RANKINGS and not self._loose(name):
            return FROM_RANKINGS[name](self.table("rankings"))
        try:
            return read_table(self.folder.store, name)
        except DamagedError as error:
            by_census = name in FEATURES[CENSUS].tables
            remedy = "the same census makes it again" if by_census else f"make it again: {command_for(name)}"
            raise DamagedError(f"{error}; {remedy}") from error

    def sql(self, query: str) -> pa.Table:
        """Return the result of a DuckDB query over the run's tables."""
        with self.connect(query) as connection, sql_errors():
            result = connection.sql(query)
            return pa.table({}) if result is None else result.to_arrow_table()

    @contextmanager
    def connect(self, query: str, **options: str) -> Iterator[DuckDBPyConnection]:
        """Yield a DuckDB connection to the tables that a query names, which reads and writes no other files.

        `options` are DuckDB's.
        """
        import duckdb

        with duckdb.connect(config=options) as connection:
            # A query copied from anywhere must not read or write other files.
            connection.execute("SET enable_external_access = false")
            for name in table_schemas():
                # Register only tables that the query may mention, because some are large.
                if re.search(rf"\b{name}\b", query, re.IGNORECASE):
                    connection.register(name, self._dataset(name) if self._is_large(name) else self.table(name))
            yield connection

    def rows(self, name: str, where: pc.Expression, columns: list[str] | None = None) -> pa.Table:
        """Return the rows of a table for which a condition holds; of a large table only the row groups that may do.

        Raises InputError like `table`.
        """
        if not self._is_large(name):
            found = self.table(name).filter(where)
            return found.select(columns) if columns else found
        try:
            return self._dataset(name).to_table(columns, filter=where)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.uri}: table {name}: {reason}; run {command_for(name)} again") from error

    def _is_large(self, name: str) -> bool:
        """Return whether to read only what is needed of a table."""
        if name in self._tables or name not in self._snapshots:
            return False
        return sum(file.checksum.size for file in self._snapshots[name].tables[name]) > WHOLE

    def _dataset(self, name: str) -> Dataset:
        return self._snapshots[name].dataset(self.folder.store, name, table_schemas()[name])

    @cached_property
    def concept_summary(self) -> pa.Table:
        """The table `concepts`, most frequent first."""
        return self.table("concepts").sort_by([("n", "descending"), ("concept", "ascending")])

    @property
    def concepts(self) -> dict[str, int]:
        """Every concept with its number of occurrences, most frequent first."""
        return dict(
            zip(self.concept_summary["concept"].to_pylist(), self.concept_summary["n"].to_pylist(), strict=True)
        )

    def concept_table(self, by: str = "score") -> pa.Table:
        """Return every concept, most frequent first: concept, occurrences, images, and its highest neuron by `by`."""
        _check_order(by)
        columns = {"concept": "concept", "occurrences": "n", "images": "n_images", "neuron": f"highest_{by}"}
        return self.concept_summary.select(list(columns.values())).rename_columns(list(columns))

    def rank(self, concept: str, k: int = 10, by: str = "score") -> pa.Table:
        """Return the concept's k highest neurons by score, specific, selective or share; columns of `rankings`.

        Raises InputError for an unknown concept, with suggestions.
        """
        _check_order(by)
        if k < 1:
            raise InputError(f"k = {k}: give at least 1 neuron to return")
        # Concepts are stored in lower case.
        name = concept.casefold()
        rows = self.rows("rankings", pc.field("concept") == name)
        if not len(rows):
            similar = difflib.get_close_matches(name, self.concepts, n=3) or list(self.concepts)[:3]
            raise InputError(f"no concept {concept!r} in {self.uri}; it has {', '.join(similar)}, …")
        column, direction = ORDERS[by]
        return rows.sort_by([(column, direction), ("rank", "ascending")]).slice(0, k)

    def neuron(self, name: str, examples: int = 5) -> dict[str, Any]:
        """Return a neuron's row of `neurons`, its concepts, and its extreme samples (`example_rows`).

        Raises InputError for a neuron outside the model.
        """
        layer, unit = self.names.parse(name)
        own = (pc.field("layer") == layer) & (pc.field("unit") == unit)
        rows = self.rows("neurons", own).to_pylist()
        if not rows:
            widths = self.info["model"]["widths"]
            raise InputError(f"{name} is outside the model: {len(widths)} layers of {max(widths)} neurons, from L0.u0")
        columns = ["concept", "rank", "score", "specific", "specific_rank", "selective", "share", "n", "activation"]
        concepts = self.rows("neuron_concepts", own, columns).sort_by([("rank", "ascending"), ("score", "descending")])
        samples = self.rows("examples", own & (pc.field("rank") <= examples))
        samples = samples.sort_by([("sign", "descending"), ("rank", "ascending")])
        return dict(rows[0]) | {"concepts": concepts.to_pylist(), "examples": example_rows(self, samples)}

    def status(self) -> Status:
        """Return the run's progress, from what is committed."""
        receipts = self.folder.receipts()
        done = list(receipts.values())
        snapshot = self.snapshot
        # Tables older than the last receipt have yet to be merged again.
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
        """Return the rows of `errors` that are committed, or the first `limit` of them."""
        return committed_failures(self.folder, self.folder.receipts().values(), limit)


def open_run(uri: str | Path) -> Run:
    """Open a run; raises InputError if there is none.

    Relative paths in its settings are resolved against the folder where it was begun.
    """
    return Run(uri)


@contextmanager
def sql_errors() -> Iterator[None]:
    """Raise DuckDB's errors in the block as InputError of one line."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise InputError(f"SQL: {str(error).splitlines()[0]}") from error


def _check_order(by: str) -> None:
    if by not in ORDERS:
        raise InputError(f"unknown order {by!r}; choose from {', '.join(ORDERS)}")
