"""Lists of a run's concepts and neurons: search, sort and filter by DuckDB, in bounded memory for a run of any size."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import duckdb

from mmray.runs.run import Run

MEMORY = "256MB"
"""What DuckDB may hold; the rest of the lists is on disk."""
TOKENS = 6
"""Tokens per neuron in lists, as in the report."""
FOUND_CONCEPTS, FOUND_NEURONS = 8, 6
"""Results of a search."""
# A name while it is being typed: L7, L7.u, L7.e12.u8.
PARTIAL_NEURON = re.compile(r"[lL]\d+(\.([eE]\d*(\.([uU]\d*)?)?|[uU]\d*)?)?")
SORTED = {
    "concepts": ("concept", "n", "n_images", "neuron", "score", "specific"),
    "neurons": ("neuron", "n_concepts", "open", "max"),
}
"""Columns that each list can be sorted by."""


class Catalog:
    """The lists of one version of a run's tables, copied from the few columns that they need."""

    def __init__(self, run: Run) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mmray-serve-")
        self._database = duckdb.connect(str(Path(self._folder.name) / "lists.duckdb"), config={"memory_limit": MEMORY})
        self._database.register("given_concepts", run.concept_summary)
        self._database.register("given_neurons", run.scan("neurons"))
        self._database.execute(
            "create table concepts as select concept, n, n_images, highest_score as neuron, score, specific "
            "from given_concepts"
        )
        self._database.execute(
            "create table neurons as select layer, unit, neuron, n_concepts, n_active / greatest(n_tokens, 1) as open, "
            f"max, tokens[1:{TOKENS}] as tokens from given_neurons"
        )
        # Unnested once, so that a search compares strings and does not open every neuron's list.
        self._database.execute("create table writers as select lower(unnest(tokens)) as token, neuron from neurons")

    def close(self) -> None:
        """Remove the lists."""
        self._database.close()
        self._folder.cleanup()

    def concepts(self, words: str = "", by: str = "n", *, down: bool = True, count: int = 50) -> dict[str, Any]:
        """Return the first `count` concepts whose name contains the words, and how many there are in all."""
        return self._list("concepts", "contains(concept, ?)", [words.lower()], by, down, count)

    def neurons(
        self, words: str = "", layer: int | None = None, by: str = "n_concepts", *, down: bool = True, count: int = 50
    ) -> dict[str, Any]:
        """Return neurons of a layer (None: of all) whose name begins with the words, or that write them as a token."""
        where, values = ["true"], list[Any]()
        if layer is not None:
            where.append("layer = ?")
            values.append(layer)
        if PARTIAL_NEURON.fullmatch(words):
            where.append("starts_with(lower(neuron), ?)")
            values.append(words.lower())
        elif words:
            where.append("neuron in (select neuron from writers where token = ?)")
            values.append(words.lower())
        return self._list("neurons", " and ".join(where), values, by, down, count)

    def search(self, words: str) -> dict[str, Any]:
        """Return concepts with the words in their name, the best matches first, and neurons as in `neurons`."""
        text = words.strip().lower()
        query = (
            "select concept as name, n, count(*) over () as total from concepts where contains(concept, $text) "
            "order by concept = $text desc, starts_with(concept, $text) desc, n desc limit $most"
        )
        concepts = self._rows(query, {"text": text, "most": FOUND_CONCEPTS})
        return {
            "concepts": [{"name": row["name"], "n": row["n"]} for row in concepts],
            "total": concepts[0]["total"] if concepts else 0,
            "neurons": self.neurons(text, count=FOUND_NEURONS)["rows"],
        }

    def most_frequent(self, count: int) -> list[str]:
        """Return the names of the most frequent concepts."""
        return [row["concept"] for row in self.concepts(count=count)["rows"]]

    def _list(self, table: str, where: str, values: list[Any], by: str, down: bool, count: int) -> dict[str, Any]:
        # Names of columns can't be parameters of a query, so only known ones may enter its text.
        column = by if by in SORTED[table] else SORTED[table][1]
        order = "layer {0}, unit {0}" if column == "neuron" and table == "neurons" else f"{column} {{0}} nulls last"
        direction, ties = "desc" if down else "asc", "concept" if table == "concepts" else "layer, unit"
        rows = self._rows(
            f"select * from {table} where {where} order by {order.format(direction)}, {ties} limit {count:d}", values
        )
        total = self._rows(f"select count(*) as total from {table} where {where}", values)[0]["total"]
        return {"rows": rows, "total": total}

    def _rows(self, query: str, values: list[Any] | dict[str, Any]) -> list[dict[str, Any]]:
        # A cursor of its own per request: requests come from several threads.
        with self._database.cursor() as cursor:
            answer = cursor.execute(query, values)
            names = [column[0] for column in answer.description]
            return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]
