"""What jobs share that look through a joint model (a model with its detector): plan, loading, reading of a unit."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeAlias, TypeVar

import pyarrow as pa
from PIL.Image import Image

from mmray.data.columns import Columns
from mmray.data.images import decode_image
from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest, cut, read_shard
from mmray.data.source import Source
from mmray.data.sources import open_source
from mmray.detector.alignment import alignment_digest
from mmray.detector.joint import JointModel, detector_digest, join
from mmray.engine import Job, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.hallucination.settings import SightSettings
from mmray.models.loading import digest, resolve
from mmray.models.options import Dtype
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons.model import load_model
from mmray.objects.statistics import GroundTruth, ObjectStatistics
from mmray.objects.words import ObjectWords
from mmray.runs.tables import ERRORS

S = TypeVar("S", bound=SightSettings)

Rows: TypeAlias = dict[str, list[dict[str, Any]]]
"""Rows by the name of their part."""
Look: TypeAlias = Callable[[Sequence[Sample], Sequence[Image]], Rows]
"""Makes rows of samples and their images."""


@dataclass(frozen=True)
class Asked:
    """How the model is loaded, and asked for a caption: as its census did."""

    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    prompt: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class JointContext:
    """All that workers need other than model, detector and data."""

    model: str
    data: str
    columns: Columns
    asked: Asked
    manifest: Manifest
    facts: ObjectStatistics
    ground_truth: GroundTruth
    """What is in an image, as settled by the data."""
    words: ObjectWords


class JointJob(Job[S, JointContext], Generic[S]):
    """A job that looks at each sample's image through a joint model; a unit's payload is a shard."""

    @abstractmethod
    def look(self, context: JointContext, joint: JointModel, source: Source) -> Look:
        """Return what makes rows of a unit's samples."""

    def worker(self, context: JointContext) -> Worker:
        """Load the joint model, and return what reads a unit and looks at it."""
        model = load_model(context.model, context.asked.dtype, trust_remote_code=context.asked.trust_remote_code)
        joint = join(model, self.settings.detector, self.settings.alignment)
        source = open_source(context.data, context.columns, captions=False)
        look = self.look(context, joint, source)

        def work(unit: Unit) -> UnitResult:
            rows: Rows = defaultdict(list)
            read = list(read_shard(source, unit.payload))
            failures = [row for row in read if isinstance(row, Failure)]
            readable = (row for row in read if isinstance(row, Sample))
            # A few small files may unfold to more than memory holds.
            for some in within_budget(readable, lambda sample: pixels_of(model, sample.image), BUDGET):
                samples, images, undecoded = _decoded(some)
                failures += undecoded
                for name, found in (look(samples, images) if samples else {}).items():
                    rows[name] += found
            rows["errors"] = [vars(failure) for failure in failures]
            schemas = {**self.parts, "errors": ERRORS}
            return UnitResult(
                {name: pa.Table.from_pylist(rows.get(name, []), schema) for name, schema in schemas.items()}
            )

        return work

    def planned(self, context: JointContext) -> Plan[JointContext]:
        """Return the plan of that context: a unit per shard."""
        shards = context.manifest.shards
        return Plan([Unit(shard.samples, shard) for shard in shards], self.digests(context), context)

    def digests(self, context: JointContext) -> dict[str, str]:
        """Return what the rows depend on, each by a digest."""
        facts, manifest, alignment = context.facts, context.manifest, self.settings.alignment
        translations = map(str, facts.translations.items())
        objects = repr((sorted(facts.counts.items()), sorted(translations)))
        return {
            "model": digest(resolve(context.model)),
            # Parts without all these columns can't be continued.
            "rows": ",".join(chain.from_iterable(schema.names for schema in self.parts.values())),
            "data": manifest.digest,
            "cut": str([shard.samples for shard in manifest.shards][:1]) + str(manifest.samples),
            "detector": detector_digest(self.settings.detector),
            "alignment": alignment_digest(alignment) if alignment else "",
            "asked": json.dumps([context.asked.dtype, context.asked.prompt, context.asked.prefix]),
            "columns": context.columns.model_dump_json(),
            "objects": hashlib.sha256(objects.encode()).hexdigest()[:16],
            "ground_truth": context.ground_truth,
            "words": context.words.digest(),
        }


def open_cut(settings: SightSettings, data: str, columns: Columns) -> tuple[Source, Manifest]:
    """Return the data, and its shards; raises InputError where there is no sample."""
    source = open_source(data, columns, captions=False)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{data}: no sample in it")
    return source, manifest


def _decoded(samples: Sequence[Sample]) -> tuple[list[Sample], list[Image], list[Failure]]:
    """Return the samples whose images can be decoded, their images, and the others as failures."""
    found: list[Sample] = []
    images: list[Image] = []
    failures: list[Failure] = []
    for sample in samples:
        try:
            if sample.image is None:
                raise ValueError("no image")
            images.append(decode_image(sample.image, sample.background))
            found.append(sample)
        except ValueError as error:
            failures.append(Failure(sample.sample_id, sample.source, "decode", f"image can't be read: {error}"))
    return found, images, failures


def schemas_of(schemas: Mapping[str, pa.Schema], *names: str) -> dict[str, pa.Schema]:
    """Return the schemas of these parts."""
    return {name: schemas[name] for name in names}
