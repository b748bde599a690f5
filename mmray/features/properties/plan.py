"""The plan of the properties: which concepts are measured, with which neurons, on which images, in which units."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from mmray.data.image_keys import image_keys, one_per_image
from mmray.data.shards import Manifest
from mmray.engine import Plan, Unit
from mmray.errors import InputError
from mmray.features.census.inputs import open_inputs
from mmray.features.census.run_samples import RunSamples
from mmray.features.census.settings import census_settings
from mmray.features.properties.settings import MOST, RANKINGS, PropertySettings
from mmray.features.properties.subject import ConceptInputs, Ranked
from mmray.models.loading import require_images
from mmray.runs.run import Run, open_run

MEASURED_PER_UNIT = 4
"""Concepts per unit of work that are measured."""
MAPPED_PER_UNIT = 24
"""Concepts per unit of work if only heat maps are drawn."""
MOST_MAPPED = 1500
"""Concepts with heat maps, the most frequent first."""


def plan_properties(settings: PropertySettings, run: Run) -> Plan[RunSamples]:
    """Choose the concepts, and the images to measure each on. The payload of a unit is its `ConceptInputs`.

    Raises InputError if there is no such concept, or no data.
    """
    shown = _shown(settings, run)
    # Generated captions are in the run's tables by now, so they are encoded like those of a dataset.
    census = census_settings(shown.info["settings"] | {"captions": "dataset"})
    require_images(census.model, "mmray properties", trust_remote_code=census.trust_remote_code)
    rows = {row["sample_id"]: row for row in shown.table("captions").to_pylist()}
    keys = image_keys(shown.table("captions"))
    if settings.held_out:
        seen = set(image_keys(run.table("captions")).values())
        rows = {name: row for name, row in rows.items() if keys[name] not in seen}
    images = _images(shown, rows, keys, settings.language)
    known = set(run.table("rankings")["concept"].unique().to_pylist())
    images = {name: found for name, found in images.items() if name in known}
    measured = [name for name, found in images.items() if len(found) >= settings.min_occurrences]
    measured = [] if settings.only == "maps" else measured[: settings.concepts]
    mapped = [] if settings.only == "properties" else list(images)[:MOST_MAPPED]
    if not measured and not mapped:
        raise InputError(
            f"{shown.uri}: no concept with {settings.min_occurrences} images"
            + (f" in language {settings.language!r}" if settings.language else "")
            + "; lower --min-occurrences"
        )
    ranked = _ranked(run, {*measured, *mapped})
    shared = _samples_nearby({sample for name in measured for sample in images[name][: settings.images]}, images, rows)
    tokens = _first_tokens(shown)
    inputs = {}
    for number, name in enumerate(dict.fromkeys([*measured, *mapped])):
        if name not in ranked:
            continue
        # Measured concepts come first in this order.
        own = images[name][: settings.images] if number < len(measured) else []
        # Each concept is the random pairing of exactly one other, half the list away.
        other = measured[(number + len(measured) // 2) % len(measured)] if own else name
        inputs[name] = ConceptInputs(
            concept=name,
            token=tokens[name],
            language=rows[images[name][0]]["language"],
            ranked=ranked[name],
            paired=ranked[other]["score"],
            own=tuple(own),
            others=tuple(_others(name, shared, images, keys, settings)) if own else (),
            maps=tuple(_alternate_domains(images[name], rows)[: settings.maps]) if name in mapped else (),
        )
    requested = {name for each in inputs.values() for name in (*each.own, *each.others, *each.maps)}
    _, _, nouns = open_inputs(census_settings(shown.info["settings"]))
    # Maps alone are cheap, so many such concepts share a unit.
    units = _units([inputs[name] for name in measured if name in inputs], MEASURED_PER_UNIT)
    units += _units([each for each in inputs.values() if not each.own], MAPPED_PER_UNIT)
    context = RunSamples(
        census,
        Manifest.from_json(shown.folder.manifest()),
        nouns,
        {name: rows[name]["shard_id"] for name in requested},
        {name: rows[name]["caption"] for name in requested},
        {name: keys[name] for name in requested},
    )
    # Payloads are no settings, but results depend on them, so the fingerprint takes them in.
    measures = hashlib.sha256(repr([unit.payload for unit in units]).encode()).hexdigest()[:16]
    of_images = {f"held-out {name}": digest for name, digest in shown.digests().items()} if settings.held_out else {}
    return Plan(units, run.digests() | of_images | {"units": measures}, context)


def _shown(settings: PropertySettings, run: Run) -> Run:
    """Return the run whose images are measured; raises InputError if it is of another model."""
    if settings.held_out is None:
        return run
    other = open_run(settings.held_out)
    if other.info["digests"]["model"] != run.info["digests"]["model"]:
        raise InputError(f"--held-out {settings.held_out}: of another model than {run.uri}; give a run of the same one")
    return other


def _images(
    run: Run, rows: Mapping[str, dict[str, Any]], keys: Mapping[str, str], language: str | None
) -> dict[str, list[str]]:
    """Return concept → one sample per image in the order of the data; the concept with the most images first.

    If several captions of an image name the concept, the first one counts.
    """
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for row in run.table("occurrences").select(["concept", "sample_id"]).to_pylist():
        if row["sample_id"] in rows and language in (None, rows[row["sample_id"]]["language"]):
            found[row["concept"]][row["sample_id"]] = None
    order = {name: number for number, name in enumerate(rows)}
    images = {name: one_per_image(sorted(samples, key=order.__getitem__), keys) for name, samples in found.items()}
    return dict(sorted(images.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def _samples_nearby(chosen: set[str], images: Mapping[str, list[str]], rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return all samples with a concept in the shards of the chosen samples, because these shards are read anyway."""
    shards = {rows[name]["shard_id"] for name in chosen}
    named = {sample for samples in images.values() for sample in samples}
    return sorted(name for name in named if rows[name]["shard_id"] in shards)


def _ranked(run: Run, names: set[str]) -> dict[str, dict[str, Ranked]]:
    """Return concept → ranking → its MOST highest neurons."""
    rankings = run.table("rankings")
    # `rankings` has up to 256 neurons per order; only the highest are measured.
    near = pc.or_(pc.less_equal(rankings["rank"], MOST), pc.less_equal(rankings["specific_rank"], MOST))
    columns = ["concept", "rank", "specific_rank", "layer", "unit", "activation"]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rankings.filter(near).select(columns).to_pylist():
        if row["concept"] in names:
            found[row["concept"]].append(row)
    ranks = dict(zip(RANKINGS, ("rank", "specific_rank"), strict=True))
    return {name: {by: _order(rows, rank) for by, rank in ranks.items()} for name, rows in found.items()}


def _order(rows: Sequence[dict[str, Any]], rank: str) -> Ranked:
    highest = sorted((row for row in rows if row[rank] <= MOST), key=lambda row: row[rank])
    neurons = tuple((row["layer"], row["unit"]) for row in highest)
    return Ranked(neurons, tuple(1.0 if row["activation"] >= 0 else -1.0 for row in highest))


def _first_tokens(run: Run) -> dict[str, str]:
    """Return concept → the scored token of its first occurrence."""
    rows = run.table("occurrences").select(["concept", "token"]).to_pylist()
    return {row["concept"]: row["token"] for row in reversed(rows)}


def _others(
    name: str,
    shared: Sequence[str],
    images: Mapping[str, list[str]],
    keys: Mapping[str, str],
    settings: PropertySettings,
) -> list[str]:
    """Draw samples of different images, no caption of which names the concept, from those that are read anyway."""
    own = {keys[sample] for sample in images[name]}
    free = one_per_image((sample for sample in shared if keys[sample] not in own), keys)
    # Seeded per concept, so that the draw does not depend on which other concepts are measured.
    return random.Random(f"{settings.seed} {name}").sample(free, min(settings.images // 2, len(free)))


def _alternate_domains(samples: Sequence[str], rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the samples in an order in which domains take turns, so that the first few show all of them."""
    seen: dict[str | None, int] = defaultdict(int)
    turns = []
    for number, name in enumerate(samples):
        domain = rows[name]["domain"]
        turns.append((seen[domain], number, name))
        seen[domain] += 1
    return [name for *_, name in sorted(turns)]


def _units(inputs: Sequence[ConceptInputs], size: int) -> list[Unit]:
    parts = (tuple(inputs[start : start + size]) for start in range(0, len(inputs), size))
    return [Unit(len(part), part) for part in parts]
