"""What `mmray selectivity` consists of: which samples have which label, which are held out, and the units of work."""

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
    """All that workers need other than the model; small compared with the data."""

    settings: SelectivitySettings
    census: CensusSettings
    labelled: Mapping[str, str]
    """Sample → label, of all samples that have one."""
    held_out: frozenset[str]
    images: Mapping[str, str]
    """The key of each sample's image."""
    replicates: Replicates
    """Of the samples that are selected from."""
    captions: Mapping[int, Mapping[str, str]]
    """Shard → sample → the caption that the run scored."""

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
        seen = self.replicates.places
        return Counter(self.labelled[name] for shard in shards for name in self.captions[shard] if name in seen)

    def digest(self) -> str:
        """Return a digest of the samples, their labels and captions."""
        known = (sorted(facts.items()) for facts in (self.labelled, self.images))
        listed = *known, sorted(self.held_out), self.replicates.samples
        texts = [sorted(some.items()) for _, some in sorted(self.captions.items())]
        return hashlib.sha256(json.dumps([listed, texts]).encode()).hexdigest()[:16]


def plan_labels(settings: SelectivitySettings, run: Run, hold_out: bool) -> LabelPlan:
    """Settle which samples are looked at, and which the selection is not to see, if any.

    Raises InputError for a label that the run does not know or that nothing is left of on either side, and for samples
    that can't be told apart.
    """
    captions = run.table("captions")
    labels = _labels(run, settings.by)
    names = captions["sample_id"].to_pylist()
    _check_names(run, names, list(zip(labels, captions["caption"].to_pylist(), strict=True)))
    labelled = {name: label for name, label in zip(names, labels, strict=True) if label is not None}
    if len(set(labelled.values())) < 2:
        raise InputError(
            f"{run.uri}: --by {settings.by}: {_found(run, settings.by, set(labelled.values()))}; "
            "at least two labels are needed"
        )
    if unknown := [label for label in settings.steered or () if label not in labelled.values()]:
        known = ", ".join(sorted(set(labelled.values())))
        raise InputError(f"--steer {settings.steer}: no label {unknown[0]!r} in {known}")
    images = image_keys(captions)
    held_out = frozenset(
        name for name in labelled if hold_out and _draw(settings.seed, images[name]) < settings.held_out
    )
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
    wanted = {*seen, *held_out}
    for row in captions.select(["sample_id", "shard_id", "caption"]).to_pylist():
        if row["sample_id"] in wanted:
            by_shard[row["shard_id"]][row["sample_id"]] = row["caption"]
    census = census_settings(run.info["settings"])
    return LabelPlan(settings, census, labelled, held_out, images, replicates, dict(by_shard))


def _labels(run: Run, by: str) -> list[str | None]:
    """Return the label of every row of `captions`."""
    captions = run.table("captions")
    if by in ("language", "domain"):
        found: list[str | None] = captions[by].to_pylist()
        return found
    if "labels" not in captions.column_names:
        return [None] * len(captions)
    known = [{entry["key"]: entry["value"] for entry in labels or ()} for labels in captions["labels"].to_pylist()]
    return [labels.get(by) for labels in known]


def _check_names(run: Run, names: Sequence[str], facts: Sequence[tuple[str | None, str]]) -> None:
    known: dict[str, tuple[str | None, str]] = {}
    for name, own in zip(names, facts, strict=True):
        if known.setdefault(name, own) != own:
            raise InputError(
                f"{run.uri}: sample_id {name!r} stands {names.count(name)} times in the run, for unlike captions or "
                "labels; take a census with --id-column NAME of ids that differ from row to row, or none for digests"
            )


def _found(run: Run, by: str, labels: set[str]) -> str:
    if labels:
        return f"all samples are {labels.pop()!r}"
    activity = run.table("activity")
    kinds = sorted(set(activity["label_kind"].unique().to_pylist()) - {"all", by})
    return f"no sample has that label; the run has {', '.join(kinds) or 'none'} (census: --label-column)"


def _draw(seed: int, name: str) -> float:
    return zlib.crc32(f"{seed} {name}".encode()) / 2**32


def _balanced(settings: SelectivitySettings, run: Run, labelled: Mapping[str, str], every: Counter[str]) -> list[str]:
    """Return as many samples of each label as give it about the tokens of the label that has fewest.

    A label's tokens a sample are those that the census counted; the samples are drawn.
    """
    rows = run.table("activity")
    rows = rows.filter(
        pc.and_(
            pc.and_(pc.equal(rows["label_kind"], settings.by), pc.equal(rows["module"], settings.module)),
            pc.and_(pc.equal(rows["layer"], 0), pc.equal(rows["unit"], 0)),
        )
    )
    tokens: Counter[str] = Counter()
    for row in rows.to_pylist():
        if settings.looked_at in ("both", row["modality"]):
            tokens[row["label"]] += row["n_tokens"]
    if missing := {label for label in labelled.values() if not tokens[label]}:
        raise InputError(
            f"{run.uri}: --balance: the census counted no {settings.looked_at} tokens of --module {settings.module} "
            f"under {', '.join(sorted(missing))}; take it with that --module, or see --modality"
        )
    members = defaultdict(list)
    for name, label in sorted(labelled.items()):
        members[label].append(name)
    each = {label: tokens[label] / every[label] for label in members}
    budget = min(each[label] * len(names) for label, names in members.items())
    generator = np.random.default_rng(settings.seed)
    kept: list[str] = []
    for label, names in sorted(members.items()):
        count = max(1, round(budget / each[label]))
        kept += [names[place] for place in generator.permutation(len(names))[:count]]
    return kept
