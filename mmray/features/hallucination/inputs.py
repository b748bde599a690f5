"""What the jobs of this feature share: planning, loading of the joint model, and reading of a unit."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, TypeAlias, TypeVar

import pyarrow as pa
from PIL.Image import Image

from mmray.data.columns import Columns
from mmray.data.images import decode_image
from mmray.data.samples import Failure, Sample
from mmray.data.shards import Manifest, Shard, cut, read_shard
from mmray.data.source import Source
from mmray.data.sources import open_source
from mmray.detector.alignment import alignment_digest
from mmray.detector.joint import JointModel, detector_digest, detector_or_demo, join
from mmray.engine import Job, Plan, Unit, UnitResult, Worker
from mmray.errors import InputError
from mmray.features.census.inputs import columns_of
from mmray.features.census.settings import census_settings
from mmray.features.hallucination.settings import ClaimSettings, DetectorSettings
from mmray.models.loading import LoadedModel, digest, require_images, resolve
from mmray.models.options import Dtype
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.neurons.model import load_model
from mmray.objects.ground_truth import survey
from mmray.objects.statistics import GroundTruth, ObjectStatistics
from mmray.objects.words import ObjectWords, open_words
from mmray.runs.run import open_run
from mmray.runs.tables import ERRORS

S = TypeVar("S", bound=DetectorSettings)

Rows: TypeAlias = dict[str, list[dict[str, Any]]]
"""Rows by the name of their part."""
Analysis: TypeAlias = Callable[[Sequence[Sample], Sequence[Image]], Rows]
"""Makes rows from samples and their decoded images."""


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded, and how captions are prompted: as in its census."""

    dtype: Dtype = "auto"
    trust_remote_code: bool = False
    prompt: str | None = None
    prefix: str | None = None


@dataclass(frozen=True)
class JointContext:
    """All that workers need besides model, detector and data."""

    model: str
    data: str
    columns: Columns
    options: ModelOptions
    manifest: Manifest
    statistics: ObjectStatistics
    ground_truth: GroundTruth
    """What counts as being in an image, with the default resolved."""
    words: ObjectWords


class JointJob(Job[S, JointContext], Generic[S]):
    """A job that analyses each sample's image with a joint model; a unit's payload is a shard."""

    @abstractmethod
    def analysis(self, context: JointContext, joint: JointModel, source: Source) -> Analysis:
        """Return the function that makes rows from a unit's samples."""

    def worker(self, context: JointContext) -> Worker:
        """Load the joint model, and return the function that reads and analyses a unit."""
        options = context.options
        model = load_model(context.model, options.dtype, trust_remote_code=options.trust_remote_code)
        joint = join(model, needed_detector(self.settings, context.model), self.settings.alignment)
        # As in `open_cut`: with captions, other rows would be samples, and the shards would not fit.
        source = open_source(context.data, context.columns, captions=False)
        analyse = self.analysis(context, joint, source)

        def work(unit: Unit) -> UnitResult:
            rows: Rows = defaultdict(list)
            failures: list[Failure] = []
            for samples, images in read_images(model, source, unit.payload, failures):
                for name, found in analyse(samples, images).items():
                    rows[name] += found
            rows["errors"] = [vars(failure) for failure in failures]
            schemas = {**self.parts, "errors": ERRORS}
            return UnitResult(
                # A part without rows is committed too, because the merge reads each part of every unit.
                {name: pa.Table.from_pylist(rows.get(name, []), schema) for name, schema in schemas.items()}
            )

        return work

    def planned(self, context: JointContext) -> Plan[JointContext]:
        """Return the plan for a context: one unit per shard."""
        shards = context.manifest.shards
        return Plan([Unit(shard.samples, shard) for shard in shards], self.digests(context), context)

    def digests(self, context: JointContext) -> dict[str, str]:
        """Return what the rows depend on besides settings."""
        alignment = self.settings.alignment
        return context_digests(context, self.parts) | {
            "detector": detector_digest(needed_detector(self.settings, context.model)),
            "alignment": alignment_digest(alignment) if alignment else "",
        }


def needed_detector(settings: DetectorSettings, model: str) -> str:
    """Return the detector given, or the demo's for the demo model. Raises InputError where there is none."""
    detector = detector_or_demo(settings.detector, model)
    if detector is None:
        raise InputError(
            f"{model}: no detector comes with it; give --detector, such as google/owlvit-base-patch32, and the "
            "--alignment that mmray align made for it"
        )
    return detector


def context_digests(context: JointContext, parts: Mapping[str, pa.Schema]) -> dict[str, str]:
    """Return digests of all that rows depend on besides settings and the detector."""
    # Keys and values are in the fingerprints of existing folders: changing one makes their parts useless.
    statistics, manifest = context.statistics, context.manifest
    translations = map(str, statistics.translations.items())
    objects = repr((sorted(statistics.counts.items()), sorted(translations)))
    return {
        "model": digest(resolve(context.model)),
        # A version with other columns can't continue the parts of this one.
        "rows": ",".join(chain.from_iterable(schema.names for schema in parts.values())),
        "data": manifest.digest,
        # The first shard and the total say how all were cut, and stay short for any number of shards.
        "cut": str([shard.samples for shard in manifest.shards][:1]) + str(manifest.samples),
        "asked": json.dumps([context.options.dtype, context.options.prompt, context.options.prefix]),
        "columns": context.columns.model_dump_json(),
        "objects": hashlib.sha256(objects.encode()).hexdigest()[:16],
        "ground_truth": context.ground_truth,
        "words": context.words.digest(),
    }


def open_claims(settings: ClaimSettings) -> JointContext:
    """Open the data, and settle what counts as being in its images.

    Raises InputError for data without objects, and for a model that takes no images.
    """
    run = open_run(settings.run)
    census = census_settings(run.info["settings"])
    require_images(census.model, "mmray hallucination", trust_remote_code=census.trust_remote_code)
    data = settings.data or census.data
    # The census's columns are those of its own data.
    columns = Columns() if settings.data else columns_of(census)
    source, manifest = open_cut(settings, data, columns)
    found = survey(source, settings.ground_truth, settings.synonyms)
    if not found.statistics.vocabulary:
        raise InputError(f"{data}: no column of objects, without which no claim can be judged")
    options = ModelOptions(census.dtype, census.trust_remote_code, census.prompt, census.prefix)
    words = open_words(found.synonyms, found.statistics.vocabulary)
    return JointContext(census.model, data, columns, options, manifest, found.statistics, found.ground_truth, words)


def read_images(
    model: LoadedModel, source: Source, shard: Shard, failures: list[Failure]
) -> Iterator[tuple[list[Sample], list[Image]]]:
    """Yield the samples of a shard with their images, in parts that fit into memory; adds what fails to `failures`."""
    read = list(read_shard(source, shard))
    failures += [row for row in read if isinstance(row, Failure)]
    readable = (row for row in read if isinstance(row, Sample))
    # Small compressed files may decode to more than memory holds, so a shard is decoded in parts.
    for part in within_budget(readable, lambda sample: pixels_of(model, sample.image), BUDGET):
        samples, images, undecoded = _decoded(part)
        failures += undecoded
        if samples:
            yield samples, images


def open_cut(settings: DetectorSettings, data: str, columns: Columns) -> tuple[Source, Manifest]:
    """Return the data and its shards. Raises InputError for data without samples."""
    source = open_source(data, columns, captions=False)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{data}: has no samples; check --data and --limit")
    return source, manifest


def _decoded(samples: Sequence[Sample]) -> tuple[list[Sample], list[Image], list[Failure]]:
    """Return the samples whose images can be decoded, their images, and a failure for each of the others."""
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
