"""Everything a report shows, gathered from a run's tables as lists and numbers, ready for JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pkgutil import resolve_name
from typing import Any

import pyarrow.compute as pc

from mmray.features import FEATURES
from mmray.neurons.scores import unit_of
from mmray.report.concepts import concept_page, number, occurrences_of, read_concepts, related_concepts, users_of
from mmray.report.definitions import definitions
from mmray.report.neurons import layer_profile, neuron_pages, uses_of
from mmray.report.section import Request, Section, map_of
from mmray.runs.run import Run

WHOLE = 1500
"""Most frequent concepts that may have a page in a report of one file; `--pages` has all."""
FAILURES = 200
"""Failed samples that are listed."""
OF_CONCEPTS = (("causal", "zeroed_own"), ("causal", "zeroed_other"))
"""Property and measure of the rows on a concept's own page; the page of properties has those over all concepts."""
TOKENS = 6
"""Tokens per neuron in lists."""


@dataclass(frozen=True)
class Content:
    """A report: the index that all pages need, and a part per concept and neuron."""

    index: dict[str, Any]
    concepts: dict[str, dict[str, Any]]
    neurons: dict[str, dict[str, Any]]
    sections: list[Section]
    captions: dict[str, str]

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.index["run"]["name"])

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Pages of concepts and neurons, by the keys that `part` in core.js takes."""
        named = {f"c:{name}": page for name, page in self.concepts.items()}
        return named | {f"n:{name}": page for name, page in self.neurons.items()}

    def samples(self) -> list[str]:
        """Return the samples of the run whose images any page shows, the most important first.

        Those of the features' pages, then the first of every concept, the second of every concept, …, then neurons'.
        """
        of_concepts, of_neurons = (
            [name for rank in zip_longest(*map(samples_of, pages.values())) for name in rank if name is not None]
            for pages in (self.concepts, self.neurons)
        )
        return list(dict.fromkeys([*self.of_sections(), *of_concepts, *of_neurons]))

    def of_sections(self) -> list[str]:
        """Return the samples on the features' pages, which load with the index."""
        return [name for section in self.sections for name in section.samples]

    def elsewhere(self) -> dict[str, set[str]]:
        """Return the samples of other data whose images the pages show, by data."""
        found: dict[str, set[str]] = defaultdict(set)
        for section in self.sections:
            for data, names in section.elsewhere:
                found[data] |= names
        return found


def samples_of(part: dict[str, Any]) -> list[str]:
    """Return the samples on a concept's or neuron's page."""
    return [row["id"] for name in ("samples", "examples", "maps") for row in part.get(name, ())]


def gather(run: Run, edits: Sequence[str] = (), limit: int | None = None) -> Content:
    """Return the report of a run with the edits in these folders, and at most `limit` concepts (None: all)."""
    maps, properties, captions = heat_maps(run), measured(run), run.table("captions")
    names = list(run.concepts)[:limit]
    chosen = {name: list(found) for name, found in maps.items()}
    concepts = read_concepts(run, names, occurrences_of(run, names), captions, chosen)
    users = users_of(concepts.values())
    pages = {
        name: concept_page(concept, related_concepts(concept, users), maps.get(name, {}), properties.get(name, []))
        for name, concept in concepts.items()
    }
    # Only neurons that the page of a concept lists have a page of their own.
    uses: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in (row for concept in concepts.values() for row in concept.neurons):
        uses[row["neuron"]].append(row)
    neurons = neuron_pages(run, uses.keys(), {name: uses_of(rows) for name, rows in uses.items()})
    found = sections(run, edits)
    listed = sorted(
        (page for page in neurons.values() if page["concepts"]),
        key=lambda page: (-len(page["concepts"]), page["neuron"]),
    )
    index = {
        **frame(run, found),
        "concepts": [concept.index_row() for concept in concepts.values()],
        "neurons": [
            {key: page[key] for key in ("neuron", "layer", "n_concepts", "open", "max")}
            | {"tokens": page["tokens"][:TOKENS]}
            for page in listed
        ],
        "layers": layer_profile(run),
    }
    texts = dict(zip(captions["sample_id"].to_pylist(), captions["caption"].to_pylist(), strict=True))
    return Content(index, pages, neurons, list(found.values()), texts)


def sections(run: Run, edits: Sequence[str] = ()) -> dict[str, Section]:
    """Return the features' sections by name."""
    request = Request(run, edits)
    # Resolved by name here: importing the features' modules above would make a circle.
    return {name: resolve_name(feature.report)(request) for name, feature in FEATURES.items() if feature.report}


def frame(run: Run, found: Mapping[str, Section]) -> dict[str, Any]:
    """Return the part of the index that does not grow with the run: facts, definitions, failures, features' pages."""
    return {
        "run": _facts(run),
        "definitions": definitions(run),
        "all_concepts": len(run.concept_summary),
        "failures": _failures(run),
        **{name: section.page for name, section in found.items()},
    }


def _facts(run: Run) -> dict[str, Any]:
    status, info = run.status(), run.info
    settings, model = info["settings"], info["model"]
    counted = run.sql("select language, domain, count(*) as count from captions group by all").to_pylist()
    labels = {kind: Counter[str]() for kind in ("language", "domain")}
    for kind, counts in labels.items():
        for row in counted:
            counts[str(row[kind])] += row["count"]
    return {
        "uri": run.uri,
        "name": run.uri.rstrip("/").rpartition("/")[2],
        "model": settings["model"],
        "data": settings["data"],
        "family": model["type"],
        "parameters": model["parameters"],
        "layers": model["layers"],
        "neurons": sum(model["widths"]),
        "samples": status.samples_done,
        "failures": status.failures,
        "skipped": status.skipped,
        "concepts": len(run.concept_summary),
        "occurrences": pc.sum(run.concept_summary["n"]).as_py() or 0,
        "score": settings["score"],
        "unit": unit_of(settings["score"], folded=settings["fold_norm"]),
        "captions": settings["captions"],
        "nouns": info["nouns"],
        "top_k": settings["top_k"],
        "prompt": settings["prompt"],
        "worker_seconds": number(status.seconds),
        "fingerprint": info["fingerprint"],
        "digests": info["digests"],
        "versions": info["versions"],
        # Data without such labels has None in every row, which says nothing.
        "labels": {kind: dict(counts.most_common()) for kind, counts in labels.items() if set(counts) != {"None"}},
    }


def _failures(run: Run) -> dict[str, Any]:
    rows, quarantined = run.table("errors").to_pylist(), run.status().quarantined
    return {
        "count": len(rows),
        "rows": [{key: row[key] for key in ("stage", "sample_id", "source", "message")} for row in rows[:FAILURES]],
        "quarantined": [{"shard": shard, "reason": reason} for shard, reason in quarantined.items()],
    }


def measured(run: Run, concept: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `properties` on concepts' own pages by concept, of one or of all."""
    by_concept: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in _of_concept(run, "properties", concept):
        if row["concept"] is not None and (row["property"], row["measure"]) in OF_CONCEPTS:
            # The protocol is the same for every concept, and stands on the page of properties.
            kept = {name: value for name, value in row.items() if name not in ("concept", "property", "protocol")}
            by_concept[row["concept"]].append(
                {name: number(value) if isinstance(value, float) else value for name, value in kept.items()}
            )
    return by_concept


def heat_maps(run: Run, concept: str | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Return concept → sample → ranking → the heat map of its neurons, of one concept or of all."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in _of_concept(run, "heatmaps", concept):
        if row["neuron"] is not None:
            continue  # on the neuron's own page
        found[row["concept"]][row["sample_id"]][row["method"]] = map_of(row) | {
            "box": row["box"] and [number(value) for value in row["box"]],
            "iou": number(row["iou"]),
        }
    return found


def _of_concept(run: Run, table: str, concept: str | None) -> Iterator[dict[str, Any]]:
    """Yield a table's rows on a concept (None: on all); none if the run doesn't have the table."""
    if table in run.tables:
        where = pc.scalar(True) if concept is None else pc.field("concept") == concept
        yield from run.rows(table, where).to_pylist()
