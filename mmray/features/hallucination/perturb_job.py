"""Perturbation as a job: move what the model sees from one concept to another, and ask again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain, islice
from typing import Any, ClassVar

import pyarrow as pa
import torch
from PIL.Image import Image

from mmray.data.columns import Columns
from mmray.data.images import decode_image
from mmray.data.samples import Sample
from mmray.data.shards import Manifest, read_shard
from mmray.data.source import Source
from mmray.detector.joint import JointModel
from mmray.engine import Output, Parts, Plan
from mmray.errors import InputError
from mmray.features.hallucination.inputs import Analysis, JointContext, JointJob, ModelOptions, Rows, open_cut
from mmray.features.hallucination.perturb import Covariance, covariance
from mmray.features.hallucination.perturb_answers import Move, Perturber, drawn_move
from mmray.features.hallucination.perturb_measures import changes
from mmray.features.hallucination.settings import PerturbationSettings
from mmray.features.hallucination.tables import TABLES
from mmray.models.loading import from_anywhere, require_images
from mmray.objects.ground_truth import survey
from mmray.objects.words import NONE, ObjectWords

REFERENCE, BATCH = 96, 16
"""Images that the covariance of embeddings is taken over, and how many of them are embedded at once."""


class PerturbJob(JointJob[PerturbationSettings]):
    """Moves embeddings of images, with controls, and records the answers under every condition."""

    name = "perturb"
    parts: ClassVar[dict[str, pa.Schema]] = {"answers": TABLES["answers"]}

    @property
    def target(self) -> str:
        """OUT."""
        return self.settings.out

    def folder(self, fingerprint: str) -> str:
        """Return OUT. It holds one analysis; another one with other settings is refused."""
        return self.target

    def plan(self) -> Plan[JointContext]:
        """Open the data, and collect the objects to move between."""
        settings = self.settings
        require_images(settings.model, "mmray perturb")
        source, manifest = open_cut(settings, settings.data, Columns())
        # Without synonyms: objects are drawn and asked about, and looked for in no text.
        statistics = survey(source, "instances", NONE).statistics
        if not statistics.vocabulary and not (settings.source and settings.target and settings.unrelated):
            raise InputError(
                f"{settings.data}: no column of objects to draw from; give --source, --target and --unrelated"
            )
        model = from_anywhere(settings.model)
        return self.planned(
            JointContext(
                model, settings.data, Columns(), ModelOptions(), manifest, statistics, "instances", ObjectWords()
            )
        )

    def analysis(self, context: JointContext, joint: JointModel, source: Source) -> Analysis:
        """Return the function that moves the embeddings of a unit's images and asks about them."""
        settings, vocabulary = self.settings, context.statistics.vocabulary

        def moves(sample: Sample) -> list[Move]:
            move = drawn_move(sample, vocabulary, settings)
            return [] if move is None else [move]

        # Once per worker, not per unit, and only when the first unit comes: it embeds REFERENCE images.
        varying = cache(lambda: reference_covariance(joint, source, context.manifest))

        def analyse(samples: Sequence[Sample], images: Sequence[Image]) -> Rows:
            return {"answers": Perturber(joint, settings, moves, varying()).rows(samples, images)}

        return analyse

    def merge(self, plan: Plan[JointContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the answers and the changes. Raises InputError where no image had concepts to move between."""
        answers = parts.table("answers")
        # Units that failed may have had images to move, so only a complete run can be blamed on the data.
        complete = len(parts.receipts) == len(plan.units) and not any(r.failures for r in parts.receipts.values())
        if not len(answers) and complete:
            raise InputError(
                f"{self.settings.data}: no image has objects to move from, to and between; give --source, --target and "
                "--unrelated"
            )
        measures = changes(answers, self.settings.draws, self.settings.seed)
        output.table("answers", answers)
        output.table("changes", pa.Table.from_pylist(measures, TABLES["changes"]))
        return {"rows": len(answers), "measures": measures}


def reference_covariance(joint: JointModel, source: Source, manifest: Manifest) -> Covariance:
    """Return the covariance of embeddings over the data's first images.

    Over those, whatever the unit: results must not depend on how the data was cut.
    """
    images = list(islice(_images(source, manifest), REFERENCE))
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    embeddings = [joint.embed(joint.pixels(batch)) for batch in batches]
    return covariance(torch.cat(embeddings), joint.tower.skipped)


def _images(source: Source, manifest: Manifest) -> Iterator[Image]:
    for row in chain.from_iterable(read_shard(source, shard) for shard in manifest.shards):
        if isinstance(row, Sample) and row.image is not None:
            with suppress(ValueError):  # reported as a failure by the image's own unit
                yield decode_image(row.image, row.background)
