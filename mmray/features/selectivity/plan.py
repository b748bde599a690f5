"""The plan of `mmray selectivity`: the label of each sample, the held-out samples, and the shards to read."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from mmray.data.image_keys import image_keys
from mmray.errors import InputError
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.features.selectivity.replicates import Replicates, draw
from mmray.features.selectivity.settings import SelectivitySettings
from mmray.runs.run import Run


@dataclass(frozen=True)
class LabelPlan:
    """What workers need in addition to the model; small compared with the data."""

    settings: SelectivitySettings
    census: CensusSettings
    labelled: Mapping[str, str]
    """Sample → label, for all samples that have one."""
    held_out: frozenset[str]
    """Samples for tests, which the selection does not see."""
    images: Mapping[str, str]
    """Sample → key of its image."""
    replicates: Replicates
    """Replicates of the samples that the selection sees."""
    captions: Mapping[int, Mapping[str, str]]
    """Shard → sample → scored caption."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in alphabetical order."""
        return self.replicates.labels

    @property
    def shards(self) -> list[int]:
        """The shards that hold samples with a label."""
        return sorted(self.captions)

    def selected_from(self, shards: Iterable[int]) -> Counter[str]:
        """Return how many samples of each label the selection sees in these shards."""
        seen = self.replicates.columns
        return Counter(self.labelled[name] for shard in shards for name in self.captions[shard] if name in seen)

    def digest(self) -> str:
        """Return a digest of the samples, their labels and captions."""
        mappings = (sorted(mapping.items()) for mapping in (self.labelled, self.images))
        listed = *mappings, sorted(self.held_out), self.replicates.samples
        texts = [sorted(captions.items()) for _, captions in sorted(self.captions.items())]
        return hashlib.sha256(json.dumps([listed, texts]).encode()).hexdigest()[:16]


def plan_labels(settings: SelectivitySettings, run: Run, hold_out: bool) -> LabelPlan:
    """Choose the samples that the selection sees, and those held out, if any.

    Raises InputError for a label that the run does not have, a label without samples on either side, and samples with
    the same id.
    """
    captions = run.table("captions")
    labels = _labels(run, settings.by)
    names = captions["sample_id"].to_pylist()
    _check_ids(run, names, list(zip(labels, captions["caption"].to_pylist(), strict=True)))
    labelled = {name: label for name, label in zip(names, labels, strict=True) if label is not None}
    if len(set(labelled.values())) < 2:
        raise InputError(
            f"{run.uri}: --by {settings.by}: {_labels_found(run, settings.by, set(labelled.values()))}; "
            "at least two labels are needed"
        )
    if unknown := [label for label in settings.steered or () if label not in labelled.values()]:
        known = ", ".join(sorted(set(labelled.values())))
        raise InputError(f"--steer {settings.steer}: no label {unknown[0]!r} in {known}")
    for entry in settings.accuracy or ():
        label = entry.rpartition("=")[0]
        if label and label not in labelled.values():
            known = ", ".join(sorted(set(labelled.values())))
            raise InputError(f"--accuracy {entry}: no label {label!r} in {known}")
    images = image_keys(captions)
    # Drawn per image: captions of one image on both sides would leak the test into the selection.
    held_out = frozenset(
        name for name in labelled if hold_out and _uniform(settings.seed, images[name]) < settings.held_out
    )
    # In the order of the data, so that --samples N is a prefix.
    seen = [name for name in names if name in labelled and name not in held_out][: settings.samples]
    if settings.balance:
        seen = _balanced(settings, run, {name: labelled[name] for name in seen}, Counter(labelled.values()))
    replicates = draw(
        {name: labelled[name] for name in seen}, settings.permutations, settings.bootstraps, settings.seed, images
    )
    if missing := set(labelled.values()) - set(replicates.labels):
        raise InputError(
            f"{run.uri}: no sample of {', '.join(sorted(missing))} is left to select from; give more samples"
        )
    if hold_out and (missing := set(replicates.labels) - {labelled[name] for name in held_out}):
        raise InputError(
            f"{run.uri}: no sample of {', '.join(sorted(missing))} is held out to test on; give more samples, or a "
            "higher --held-out"
        )
    by_shard: dict[int, dict[str, str]] = defaultdict(dict)
    chosen = {*seen, *held_out}
    for row in captions.select(["sample_id", "shard_id", "caption"]).to_pylist():
        # Captions travel with the plan, because the run may have generated them.
        if row["sample_id"] in chosen:
            by_shard[row["shard_id"]][row["sample_id"]] = row["caption"]
    census = census_settings(run.info["settings"])
    return LabelPlan(settings, census, labelled, held_out, images, replicates, dict(by_shard))


def _labels(run: Run, by: str) -> list[str | None]:
    """Return the label of every row of `captions`."""
    captions = run.table("captions")
    if by in ("language", "domain"):
        found: list[str | None] = captions[by].to_pylist()
        return found
    by_column = [{entry["key"]: entry["value"] for entry in labels or ()} for labels in captions["labels"].to_pylist()]
    return [labels.get(by) for labels in by_column]


def _check_ids(run: Run, names: Sequence[str], contents: Sequence[tuple[str | None, str]]) -> None:
    """Raise InputError if samples of one id differ in label or caption, because sums are kept by id."""
    first: dict[str, tuple[str | None, str]] = {}
    for name, content in zip(names, contents, strict=True):
        if first.setdefault(name, content) != content:
            raise InputError(
                f"{run.uri}: sample_id {name!r} occurs {names.count(name)} times in the run, with different captions "
                "or labels; repeat the census with an --id-column of unique ids, or without one for digests"
            )


def _labels_found(run: Run, by: str, labels: set[str]) -> str:
    if labels:
        return f"all samples are {labels.pop()!r}"
    activity = run.table("activity")
    kinds = sorted(set(activity["label_kind"].unique().to_pylist()) - {"all", by})
    return f"no sample has that label; the run has {', '.join(kinds) or 'none'} (census: --label-column)"


def _uniform(seed: int, name: str) -> float:
    """Return a number from 0 to 1 that depends on the name alone, so that more data does not move samples across."""
    return zlib.crc32(f"{seed} {name}".encode()) / 2**32


def _balanced(settings: SelectivitySettings, run: Run, labelled: Mapping[str, str], every: Counter[str]) -> list[str]:
    """Draw samples of each label so that all labels have about as many tokens as the label with the fewest.

    Tokens per sample are the mean that the census counted for the label.
    """
    rows = run.table("activity")
    # Of all modules together, and of one that a census never counts, the decoder's tokens stand for the length.
    module = settings.module if settings.module in ("vision", "projector") else "language"
    # Counts of tokens are the same for all neurons, so those of one will do.
    rows = rows.filter(
        pc.and_(
            pc.and_(pc.equal(rows["label_kind"], settings.by), pc.equal(rows["module"], module)),
            pc.and_(pc.equal(rows["layer"], 0), pc.equal(rows["unit"], 0)),
        )
    )
    tokens: Counter[str] = Counter()
    for row in rows.to_pylist():
        # A census doesn't count prompts, which are alike.
        if settings.modality in ("all", row["modality"]):
            tokens[row["label"]] += row["n_tokens"]
    if missing := {label for label in labelled.values() if not tokens[label]}:
        raise InputError(
            f"{run.uri}: --balance: the census counted no {settings.modality} tokens of --module {module} under "
            f"{', '.join(sorted(missing))}; repeat it with that --module, or see --count"
        )
    members = defaultdict(list)
    for name, label in sorted(labelled.items()):
        members[label].append(name)
    per_sample = {label: tokens[label] / every[label] for label in members}
    budget = min(per_sample[label] * len(names) for label, names in members.items())
    generator = np.random.default_rng(settings.seed)
    kept: list[str] = []
    for label, names in sorted(members.items()):
        # At least one, so that no label vanishes by rounding.
        count = max(1, round(budget / per_sample[label]))
        kept += [names[number] for number in generator.permutation(len(names))[:count]]
    return kept
