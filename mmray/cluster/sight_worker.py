"""Actors that look through a joint model: one replica each, units of samples, rows committed; thin shells."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import torch
from PIL.Image import Image

from mmray.cluster.units import UnitWorker
from mmray.datasets.columns import Columns
from mmray.datasets.images import decode_image
from mmray.datasets.samples import Failure, Sample
from mmray.datasets.shards import Manifest, Shard, read_shard
from mmray.datasets.sources import open_source
from mmray.derived import OPINION_SCHEMAS
from mmray.errors import InputError
from mmray.evaluation.facts import DataFacts
from mmray.evaluation.ground_truth import with_ground_truth
from mmray.evaluation.naming import object_naming
from mmray.evaluation.object_words import ObjectWords
from mmray.evaluation.opinions.claims import Claimant
from mmray.evaluation.opinions.mistakes import picture
from mmray.evaluation.opinions.moving import Mover
from mmray.evaluation.opinions.settings import OpinionSettings, PerturbationSettings, SightSettings
from mmray.neurons.model import load_model
from mmray.perception.joint import join
from mmray.perception.perturbing import Covariance, covariance
from mmray.runs import Receipt, RunFolder
from mmray.settings import Dtype
from mmray.storage import patiently

REFERENCE, BATCH = 96, 16
"""Images that tell how embeddings vary, and how many of them are looked at at once."""
PICTURES = 8
"""Pictures of mistakes that a unit keeps."""


@dataclass(frozen=True)
class Asked:
    """How the model is loaded, and asked for a caption: as its census did."""

    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    prompt: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that workers need besides model, detector and data."""

    settings: SightSettings
    model: str
    data: str
    columns: Columns
    asked: Asked
    manifest: Manifest
    facts: DataFacts
    words: ObjectWords


class SightWorker(UnitWorker):
    """Loads the joint model once, then answers each unit of work with the receipt of what it committed."""

    def __init__(self, plan: Plan, folder: str, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.plan = plan
        try:
            model = load_model(plan.model, plan.asked.dtype, trust_remote_code=plan.asked.trust_remote_code)
            self.joint = join(model, plan.settings.detector, plan.settings.alignment)
            self.folder = RunFolder.at(folder, patient=True)
            self.source = patiently(lambda: open_source(plan.data, plan.columns, captions=False))
        except InputError as error:
            self.problem = str(error)

    @abstractmethod
    def tables(self, samples: Sequence[Sample], images: Sequence[Image]) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of a unit's samples by table."""

    def unit(self, unit: int) -> Receipt:
        """Do and commit one unit of work."""
        shard = self.plan.manifest.shards[unit]
        return self.attempted(unit, shard.samples, lambda: self.commit(shard))

    def commit(self, shard: Shard) -> Receipt:
        """Look at a shard's samples, and commit their rows."""
        began = time.perf_counter()
        rows = list(read_shard(self.source, shard))
        failures = [row for row in rows if isinstance(row, Failure)]
        samples: list[Sample] = []
        images: list[Image] = []
        for row in rows:
            if isinstance(row, Sample):
                try:
                    if row.image is None:
                        raise ValueError("no image")
                    images.append(decode_image(row.image, row.background))
                    samples.append(row)
                except ValueError as error:
                    failures.append(Failure(row.sample_id, row.source, "decode", f"image can't be read: {error}"))
        found = self.tables(samples, images) if samples else {}
        found["errors"] = [vars(failure) for failure in failures]
        schemas = {name: OPINION_SCHEMAS[name] for name in (*PARTS[type(self.plan.settings)], "errors")}
        tables = {name: pa.Table.from_pylist(found.get(name, []), schema) for name, schema in schemas.items()}
        return self.folder.commit_shard(shard.shard_id, tables, shard.samples, time.perf_counter() - began)


class OpinionWorker(SightWorker):
    """Has the model say what it sees, and the detector give its opinion on that."""

    def tables(self, samples: Sequence[Sample], images: Sequence[Image]) -> dict[str, list[dict[str, Any]]]:
        """Return claims, and pictures of those that are wrong."""
        settings, facts = self.plan.settings, self.plan.facts
        assert isinstance(settings, OpinionSettings)
        naming = object_naming(facts.vocabulary, facts.translations, self.plan.words)
        truth = settings.ground_truth or "instances"
        samples = [with_ground_truth(sample, truth, naming) for sample in samples]
        known = [place for place, sample in enumerate(samples) if sample.objects is not None]
        samples, images = [samples[place] for place in known], [images[place] for place in known]
        if not samples:
            return {}
        claimant = Claimant(
            self.joint,
            facts,
            naming,
            self.plan.asked.prompt,
            self.plan.asked.prefix,
            settings.questions,
            settings.seed,
            settings.batch_size,
            settings.longest,
        )
        claims = claimant.claims(samples, images)
        shown = dict(zip((sample.sample_id for sample in samples), images, strict=True))
        # What is claimed of an image is claimed of each of its samples.
        wrong: dict[tuple[str, str, str], dict[str, Any]] = {}
        for claim in claims:
            if claim["claimed"] and not claim["present"]:
                wrong.setdefault((claim["image"], claim["kind"], claim["word"]), claim)
        mistakes = [
            claim | {"picture": picture(shown[claim["sample_id"]], claim["box"], claim["mistaken_box"])}
            for claim in islice(wrong.values(), PICTURES)
        ]
        return {"claims": claims, "mistakes": mistakes}


class PerturbationWorker(SightWorker):
    """Moves what the model sees, and asks it again."""

    def tables(self, samples: Sequence[Sample], images: Sequence[Image]) -> dict[str, list[dict[str, Any]]]:
        """Return the answers under every condition."""
        settings = self.plan.settings
        assert isinstance(settings, PerturbationSettings)
        mover = Mover(self.joint, settings, self.plan.facts.vocabulary, self.varying)
        return {"answers": mover.rows(samples, images)}

    @cached_property
    def varying(self) -> Covariance:
        """How embeddings of the data's first images vary."""
        images = list(islice(self._images(), REFERENCE))
        parts = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        embeddings = [self.joint.embed(self.joint.pixels(part)) for part in parts]
        return covariance(torch.cat(embeddings), self.joint.sight.skipped)

    def _images(self) -> Iterator[Image]:
        for row in chain.from_iterable(read_shard(self.source, shard) for shard in self.plan.manifest.shards):
            if isinstance(row, Sample) and row.image is not None:
                with suppress(ValueError):
                    yield decode_image(row.image, row.background)


PARTS: dict[type[SightSettings], tuple[str, ...]] = {
    OpinionSettings: ("claims", "mistakes"),
    PerturbationSettings: ("answers",),
}
"""What a unit of work commits besides errors."""
