"""The concepts of a report: a row of the index for each, and what its page shows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, isfinite, sqrt
from typing import Any

import pyarrow.compute as pc

from mmray.data.image_keys import image_keys, one_per_image
from mmray.runs.run import Run

HIGHEST = 12
"""Neurons by score that a concept's page lists; those of the ten highest by `specific` are added."""
BY_SPECIFIC = 10
SAMPLES = 6
"""Example images of a concept."""
FIRST_TOKENS, TOKENS = 5, 10
"""Tokens shown of a concept's highest neuron in lists, and of each neuron on the concept's page."""
KIN = 8
"""Concepts named that share neurons."""
NORMAL = 1.96
"""Standard errors on both sides of a mean that hold it at 95 %."""


@dataclass
class Concept:
    """A concept with what several pages say of it."""

    name: str
    n: int
    token: str
    language: str | None
    images: int | None
    """Different images among them; None in a run of an earlier version."""
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
        """Return whether its own token is among those that one of its ten highest neurons writes."""
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
    """Return a number with the digits that a page shows; None where there is none, for JSON has no NaN."""
    return None if value is None or not isfinite(value) else float(f"{value:.4g}")


def read_concepts(
    run: Run, captions: Mapping[str, dict[str, Any]], chosen: Mapping[str, Sequence[str]], limit: int | None
) -> dict[str, Concept]:
    """Return the run's concepts, most frequent first, `limit` at most (None: all).

    `chosen` are samples of a concept to be shown first, because there are heat maps of them. All are of different
    images.
    """
    images = image_keys(run.table("captions"))
    gathered: dict[str, list[dict[str, Any]]] = defaultdict(list)
    columns = ["concept", "sample_id", "token", "log_prob"]
    for row in run.table("occurrences").select(columns).to_pylist():
        gathered[row["concept"]].append(row)
    names = list(run.concepts)[:limit]
    ranked = _ranked(run, names)
    found = {}
    for name in names:
        if name not in ranked:
            continue
        rows = gathered[name]
        languages = Counter(captions[row["sample_id"]]["language"] for row in rows)
        first = list(chosen.get(name, ()))
        others = _varied(one_per_image((row["sample_id"] for row in rows), images), captions)
        found[name] = Concept(
            name,
            len(rows),
            rows[0]["token"],
            languages.most_common(1)[0][0],
            ranked[name][0].get("n_images"),
            sum(exp(row["log_prob"]) for row in rows) / len(rows),
            ranked[name],
            one_per_image([*first, *others], images)[: max(SAMPLES, len(first))],
        )
    return found


def _ranked(run: Run, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `rankings` that pages list, by concept, in order of score."""
    rankings = run.table("rankings")
    near = pc.or_(pc.less_equal(rankings["rank"], HIGHEST), pc.less_equal(rankings["specific_rank"], BY_SPECIFIC))
    wanted, found = set(names), defaultdict(list)
    for row in rankings.filter(near).to_pylist():
        if row["concept"] in wanted:
            found[row["concept"]].append(row)
    return {name: sorted(rows, key=lambda row: row["rank"]) for name, rows in found.items()}


def _varied(samples: Sequence[str], captions: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return samples in an order in which the domains take turns."""
    seen: Counter[str | None] = Counter()
    turns = []
    for place, name in enumerate(samples):
        domain = captions[name]["domain"]
        turns.append((seen[domain], place, name))
        seen[domain] += 1
    return [name for *_, name in sorted(turns)]


def kin_of(concepts: Mapping[str, Concept]) -> dict[str, list[dict[str, Any]]]:
    """Return of each concept those that share most of its ten highest neurons, in any language."""
    users: dict[str, list[str]] = defaultdict(list)
    for concept in concepts.values():
        for row in concept.highest:
            users[row["neuron"]].append(concept.name)
    found = {}
    for concept in concepts.values():
        shared = Counter(name for row in concept.highest for name in users[row["neuron"]] if name != concept.name)
        best = sorted(shared.items(), key=lambda pair: (-pair[1], -concepts[pair[0]].n, pair[0]))[:KIN]
        found[concept.name] = [{"name": name, "shared": count} for name, count in best if count > 1]
    return found


def concept_page(
    concept: Concept, kin: list[dict[str, Any]], maps: Mapping[str, dict[str, Any]], measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what the concept's page shows, with the heat maps of its samples and what was measured of it."""
    return concept.index_row() | {
        "token": concept.token,
        "neurons": [_neuron_row(row) for row in concept.neurons],
        "kin": kin,
        "samples": [{"id": name, "maps": maps.get(name, {})} for name in concept.samples],
        "properties": measured,
    }


def _neuron_row(row: Mapping[str, Any]) -> dict[str, Any]:
    # The interval of a mean over occurrences; of a single one nothing is known.
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
