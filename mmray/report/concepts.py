"""Concepts in the report: their rows in the index, and their pages."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isfinite, sqrt
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmray.data.image_keys import image_keys, one_per_image
from mmray.runs.run import Run

HIGHEST, BY_SPECIFIC = 12, 10
"""Neurons that a concept's page lists: the highest by score, and the highest by `specific`."""
SAMPLES = 6
"""Example images per concept."""
FIRST_TOKENS, TOKENS = 5, 10
"""Tokens shown per neuron: in lists of concepts, and on a concept's page."""
RELATED = 8
"""Concepts listed that share neurons."""
NORMAL = 1.96
"""Standard errors on each side of a mean for a 95 % interval."""


@dataclass
class Concept:
    """A concept with what several pages show of it."""

    name: str
    n: int
    token: str
    language: str | None
    images: int | None
    """Different images among its occurrences; None in runs of earlier versions."""
    probability: float
    """Mean probability of its first token at its occurrences."""
    neurons: list[dict[str, Any]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    @property
    def highest(self) -> list[dict[str, Any]]:
        """Its ten highest neurons by score."""
        return self.neurons[:10]

    @property
    def is_read(self) -> bool:
        """Return whether one of its ten highest neurons writes its own token."""
        return any(self.token in row["tokens"] for row in self.highest)

    def index_row(self) -> dict[str, Any]:
        """Return its row of the index."""
        first = self.neurons[0]
        return {
            "name": self.name,
            "n": self.n,
            "images": self.images,
            "language": self.language,
            "neuron": first["neuron"],
            "score": number(first["score"]),
            "specific": number(max(row["specific"] for row in self.neurons)),
            "share": number(first["share"]),
            "probability": number(self.probability),
            "read": self.is_read,
            "negative": first["activation"] < 0,
            "tokens": first["tokens"][:FIRST_TOKENS],
            "sample": self.samples[0] if self.samples else None,
        }


def number(value: float | None) -> float | None:
    """Return a number rounded to the digits that a page shows; None for NaN and infinity, which JSON lacks."""
    return None if value is None or not isfinite(value) else float(f"{value:.4g}")


def read_concepts(
    run: Run,
    names: Sequence[str],
    occurrences: Mapping[str, Sequence[Mapping[str, Any]]],
    captions: pa.Table,
    chosen: Mapping[str, Sequence[str]],
) -> dict[str, Concept]:
    """Return these concepts of a run, in this order; those too rare to be ranked are left out.

    `occurrences` are those to show of each concept (`occurrences_of`), and `captions` has the rows of their samples.
    `chosen` are samples of a concept to show first, because they have heat maps. No image is shown twice.
    """
    images = image_keys(captions)
    labels = {row["sample_id"]: row for row in captions.select(["sample_id", "language", "domain"]).to_pylist()}
    ranked = ranked_neurons(run, names)
    found = {}
    for name in names:
        if name not in ranked:
            continue
        rows = occurrences[name]
        languages = Counter(labels[row["sample_id"]]["language"] for row in rows)
        # Samples with heat maps come first, and are all shown even where they are more than SAMPLES.
        first = list(chosen.get(name, ()))
        others = _alternating(one_per_image((row["sample_id"] for row in rows), images), labels)
        found[name] = Concept(
            name,
            ranked[name][0]["n"],
            rows[0]["token"],
            languages.most_common(1)[0][0],
            ranked[name][0]["n_images"],
            sum(exp(row["log_prob"]) for row in rows) / len(rows),
            ranked[name],
            one_per_image([*first, *others], images)[: max(SAMPLES, len(first))],
        )
    return found


def occurrences_of(run: Run, names: Sequence[str], most: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return by concept the occurrences of these concepts, in the order of the data; at most `most` in all."""
    columns, where = ["concept", "sample_id", "token", "log_prob"], among("concept", names)
    if most is None:
        rows = run.rows("occurrences", where, columns)
    else:
        # Reads no further than it has to.
        rows = run.scan("occurrences").head(most, columns=columns, filter=where)
    found = defaultdict(list)
    for row in rows.to_pylist():
        found[row["concept"]].append(row)
    return found


def ranked_neurons(run: Run, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `rankings` that pages list, by concept and in order of rank."""
    near = (pc.field("rank") <= HIGHEST) | (pc.field("specific_rank") <= BY_SPECIFIC)
    found = defaultdict(list)
    for row in run.rows("rankings", near & among("concept", names)).to_pylist():
        found[row["concept"]].append(row)
    return {name: sorted(rows, key=lambda row: row["rank"]) for name, rows in found.items()}


def among(column: str, values: Sequence[Any]) -> pc.Expression:
    """Return the condition that a column has one of these values."""
    if not values:
        return pc.scalar(False)
    # Of one value, row groups that lack it are found by their bounds.
    return pc.field(column) == values[0] if len(values) == 1 else pc.field(column).isin(pa.array(values))


def _alternating(samples: Sequence[str], captions: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the samples reordered so that their domains take turns."""
    seen: Counter[str | None] = Counter()
    turns = []
    for position, name in enumerate(samples):
        domain = captions[name]["domain"]
        # The n-th sample of every domain sorts before the n + 1-th of any.
        turns.append((seen[domain], position, name))
        seen[domain] += 1
    return [name for *_, name in sorted(turns)]


def users_of(concepts: Iterable[Concept]) -> dict[str, list[tuple[str, int]]]:
    """Return for each neuron the concepts that have it among their ten highest, with their occurrences."""
    users: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for concept in concepts:
        for row in concept.highest:
            users[row["neuron"]].append((concept.name, concept.n))
    return users


def related_concepts(concept: Concept, users: Mapping[str, Sequence[tuple[str, int]]]) -> list[dict[str, Any]]:
    """Return the concepts that share most of a concept's ten highest neurons, in any language; see `users_of`."""
    shared = Counter(user for row in concept.highest for user in users[row["neuron"]] if user[0] != concept.name)
    # Sharing a single neuron is common between unrelated concepts, so that is not listed.
    best = sorted(shared.items(), key=lambda pair: (-pair[1], -pair[0][1], pair[0][0]))[:RELATED]
    return [{"name": name, "shared": count} for (name, _), count in best if count > 1]


def concept_page(
    concept: Concept, related: list[dict[str, Any]], maps: Mapping[str, dict[str, Any]], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a concept's page, with the heat maps of its samples and the properties measured for it."""
    return concept.index_row() | {
        "token": concept.token,
        "neurons": [_neuron_row(row) for row in concept.neurons],
        "related": related,
        "samples": [{"id": name, "maps": maps.get(name, {})} for name in concept.samples],
        "properties": measured,
    }


def _neuron_row(row: Mapping[str, Any]) -> dict[str, Any]:
    # Half the interval of the mean over occurrences. A single occurrence has no spread.
    half = NORMAL * row["score_std"] / sqrt(row["n"]) if row["n"] > 1 else None
    numbers = {name: number(row[name]) for name in ("score", "specific", "share")}
    return numbers | {
        "neuron": row["neuron"],
        "rank": row["rank"],
        "specific_rank": row["specific_rank"],
        "half": number(half),
        "certified": row["certified"],
        "negative": row["activation"] < 0,
        "tokens": row["tokens"][:TOKENS],
    }
