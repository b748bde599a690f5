"""What the pages of a served run show, read from its tables when a page asks for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import pyarrow.compute as pc

from mmray.data.samples import Sample
from mmray.errors import InputError
from mmray.report.concepts import (
    FIRST_TOKENS,
    among,
    concept_page,
    number,
    occurrences_of,
    read_concepts,
    related_concepts,
)
from mmray.report.content import frame, heat_maps, measured, sections
from mmray.report.neurons import EXAMPLES, layer_profile, neuron_pages, of_neurons, uses_of
from mmray.report.writing import picture, run_samples
from mmray.runs.run import Run, open_run, sql_errors
from mmray.runs.snapshots import snapshots
from mmray.serve.catalog import Catalog

GALLERY = 24
"""Concepts on the first page."""
OCCURRENCES = 1000
"""Occurrences that are read for a concept's page; a frequent concept has more."""
ROWS = 1000
"""Most rows of an answer to SQL."""
SECONDS = 30
"""After which a query is stopped."""
QUERY_MEMORY = "256MB"
PICTURES = 4000
"""Thumbnails that are kept, of a few kilobytes each."""


class LiveRun:
    """One version of a run: its pages' data, in the form of the report's."""

    def __init__(self, uri: str, edits: Sequence[str] = ()) -> None:
        self.run: Run = open_run(uri)
        self.edits = edits
        self.version = _version(self.run)
        self.catalog = Catalog(self.run)
        self.picture = lru_cache(PICTURES)(self._picture)
        self._reading = threading.Lock()
        self.index = self._index()
        """What every page needs, like the index of a report."""

    def is_current(self) -> bool:
        """Return whether no newer tables have been written."""
        return _version(self.run) == self.version

    def _index(self) -> dict[str, Any]:
        found = sections(self.run, self.edits)
        index = frame(self.run, found)
        names = self.catalog.most_frequent(GALLERY)
        rows = [row | {"sample": sample} for row, sample in zip(self._listed(names), self._first(names), strict=True)]
        index |= {"concepts": rows, "neurons": [], "layers": None}
        wanted = [name for section in found.values() for name in section.samples]
        return {"index": index, "parts": {}, "images": {}, "captions": self.captions(wanted)}

    @cached_property
    def columns(self) -> dict[str, list[str]]:
        """Table → its columns."""
        return {name: self.run.scan(name).schema.names for name in self.run.tables}

    def part(self, key: str) -> tuple[Any, dict[str, str]] | None:
        """Return the page of a key of the report (`c:dog`, `n:L7.u89`, `layers:`) with the captions of its samples."""
        kind, _, name = key.partition(":")
        return (self._layers, {}) if kind == "layers" else self._concept(name) if kind == "c" else self._neuron(name)

    def concepts(self, words: str, by: str, *, down: bool, count: int) -> dict[str, Any]:
        """Return the first rows of the list of concepts."""
        found = self.catalog.concepts(words, by, down=down, count=count)
        return found | {"rows": self._listed([row["concept"] for row in found["rows"]], found["rows"])}

    def _listed(self, names: Sequence[str], known: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        columns = ["concept", "n", "n_images", "neuron", "score", "specific", "share", "activation", "tokens"]
        first = self.run.rows("rankings", (pc.field("rank") == 1) & among("concept", names), columns)
        found = {row["concept"]: row for row in first.to_pylist()}
        specific = {row["concept"]: row["specific"] for row in known or ()}
        return [
            {
                "name": name,
                "n": row["n"],
                "images": row["n_images"],
                "neuron": row["neuron"],
                "score": number(row["score"]),
                "specific": number(specific.get(name, row["specific"])),
                "share": number(row["share"]),
                "negative": row["activation"] < 0,
                "tokens": row["tokens"][:FIRST_TOKENS],
            }
            for name, row in ((name, found[name]) for name in names)
        ]

    def _first(self, names: Sequence[str]) -> list[str | None]:
        """Return a sample of each concept; None for those that are not among the first occurrences."""
        rows = occurrences_of(self.run, names, OCCURRENCES)
        return [rows[name][0]["sample_id"] if name in rows else None for name in names]

    def _concept(self, name: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        maps = heat_maps(self.run, name)
        rows = occurrences_of(self.run, [name], OCCURRENCES)
        if not rows:
            return None
        samples = sorted({row["sample_id"] for row in rows[name]} | set(maps.get(name, ())))
        captions = self.run.rows("captions", among("sample_id", samples))
        found = read_concepts(self.run, [name], rows, captions, {name: list(maps.get(name, ()))})
        if not found:
            return None
        concept = found[name]
        related = related_concepts(concept, self._users([row["neuron"] for row in concept.highest]))
        page = concept_page(concept, related, maps.get(name, {}), measured(self.run, name).get(name, []))
        texts = dict(zip(captions["sample_id"].to_pylist(), captions["caption"].to_pylist(), strict=True))
        return page, {sample: texts[sample] for sample in concept.samples}

    def _users(self, names: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        """Return the concepts that have these neurons among their ten highest, with their occurrences."""
        users: dict[str, list[tuple[str, int]]] = {name: [] for name in names}
        where = of_neurons(self.run, names) & (pc.field("rank") <= 10)
        for row in self.run.rows("neuron_concepts", where, ["layer", "unit", "concept", "n"]).to_pylist():
            users[self.run.names.name(row["layer"], row["unit"])].append((row["concept"], row["n"]))
        return users

    def _neuron(self, name: str) -> tuple[dict[str, Any], dict[str, str]] | None:
        try:
            known = self.run.neuron(name, EXAMPLES)
        except InputError:
            return None
        page = neuron_pages(self.run, [name], {name: uses_of(known["concepts"])})[name]
        captions = {row["sample_id"]: row["caption"] for row in known["examples"]}
        return page, captions | self.captions([row["id"] for row in page["maps"] if row["id"] not in captions])

    @cached_property
    def _layers(self) -> list[dict[str, Any]]:
        return layer_profile(self.run)

    def captions(self, samples: Sequence[str]) -> dict[str, str]:
        """Return the captions of these samples."""
        if not samples:
            return {}
        rows = self.run.rows("captions", among("sample_id", sorted(set(samples))), ["sample_id", "caption"])
        return dict(zip(rows["sample_id"].to_pylist(), rows["caption"].to_pylist(), strict=True))

    def sample(self, sample_id: str) -> Sample:
        """Return a sample of the run's data; raises InputError if it is not there, or has no image."""
        with self._reading:
            found = next(run_samples(self.run, [sample_id]), None)
        if found is None or not found.image:
            raise InputError(f"sample {sample_id!r}: no image at hand; is the run's data still in its place?")
        return found

    def _picture(self, sample_id: str) -> bytes | None:
        try:
            sample = self.sample(sample_id)
            return picture(sample.image or b"", sample.background)
        except (InputError, ValueError):
            return None

    def sql(self, query: str) -> dict[str, Any]:
        """Return at most ROWS rows of a SELECT over the run's tables.

        Raises InputError for another statement, for errors, and for a query that takes too long. It can't read files.
        """
        import duckdb

        # Without temporary files, and without access to this process's variables.
        options = {"memory_limit": QUERY_MEMORY, "temp_directory": "", "python_enable_replacements": "false"}
        with self.run.connect(query, **options) as connection, sql_errors():
            # Otherwise the query itself could lift these limits.
            connection.execute("set lock_configuration = true")
            statements = connection.extract_statements(query)
            if [one.type for one in statements] != [duckdb.StatementType.SELECT]:
                raise InputError("SQL: give one SELECT; the tables are read only")
            # DuckDB has no time limit of its own.
            stop = threading.Timer(SECONDS, connection.interrupt)
            stop.start()
            try:
                answer = connection.execute(statements[0])
                names = [column[0] for column in answer.description]
                # One more than is shown, to know whether there are more.
                rows = answer.fetchmany(ROWS + 1)
            except duckdb.InterruptException:
                raise InputError(f"SQL: stopped after {SECONDS} s; add a limit or a condition") from None
            finally:
                stop.cancel()
        # Through JSON, which has no dates, decimals or NaN.
        shown = json.loads(json.dumps(rows[:ROWS], default=str), parse_constant=lambda _: None)
        return {"columns": names, "rows": shown, "more": len(rows) > ROWS}


def _version(run: Run) -> dict[str, str]:
    return {job: numbers[0] for job, numbers in snapshots(run.folder.store).items()}
