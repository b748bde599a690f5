"""Bias as a job: ask a run's model about portraits, with their embeddings as they are and moved between two prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import pyarrow as pa
from PIL.Image import Image

from mmray.data.columns import Columns
from mmray.data.samples import Sample
from mmray.data.source import Source
from mmray.detector.joint import JointModel
from mmray.engine import Output, Parts, Plan
from mmray.errors import InputError
from mmray.features.census.inputs import columns_of
from mmray.features.census.settings import census_settings
from mmray.features.hallucination.bias import bias_table
from mmray.features.hallucination.inputs import Analysis, JointContext, JointJob, ModelOptions, Rows, open_cut
from mmray.features.hallucination.perturb_answers import Move, Perturber
from mmray.features.hallucination.perturb_job import reference_covariance
from mmray.features.hallucination.settings import BiasSettings
from mmray.features.hallucination.tables import TABLES
from mmray.models.loading import require_images
from mmray.objects.ground_truth import survey
from mmray.objects.lexicon import objects_of
from mmray.objects.words import NONE, ObjectWords
from mmray.runs.run import open_run


class BiasJob(JointJob[BiasSettings]):
    """Asks about images before and after their embeddings move from each pair's source to its target."""

    name = "bias"
    parts: ClassVar[dict[str, pa.Schema]] = {"bias_answers": TABLES["bias_answers"]}

    @property
    def target(self) -> str:
        """The run."""
        return self.settings.run

    def plan(self) -> Plan[JointContext]:
        """Open the data. Raises InputError where its objects are known and none is any pair's source."""
        settings = self.settings
        census = census_settings(open_run(settings.run).info["settings"])
        require_images(census.model, "mmray bias", trust_remote_code=census.trust_remote_code)
        data = settings.data or census.data
        # The census's columns are those of its own data.
        columns = Columns() if settings.data else columns_of(census)
        source, manifest = open_cut(settings, data, columns)
        statistics = survey(source, "instances", NONE).statistics
        sources = {one.casefold() for one, _ in settings.pairs}
        if statistics.vocabulary and not sources & set(statistics.vocabulary):
            raise InputError(
                f"{data}: no image has {' or '.join(sorted(sources))} among its objects; see --pair, or leave them out "
                "to move every image by every pair"
            )
        options = ModelOptions(census.dtype, census.trust_remote_code)
        return self.planned(
            JointContext(census.model, data, columns, options, manifest, statistics, "instances", ObjectWords())
        )

    def analysis(self, context: JointContext, joint: JointModel, source: Source) -> Analysis:
        """Return the function that moves the embeddings of a unit's images by their pairs, and asks about them."""
        settings = self.settings
        one, other = settings.unrelated

        def moves(sample: Sample) -> list[Move]:
            own = objects_of(sample)
            # Without known objects an image may show any pair's source, so that it is moved by all.
            pairs = [pair for pair in settings.pairs if own is None or pair[0].casefold() in own]
            return [Move(first, second, (one, other), None) for first, second in pairs]

        varying = cache(lambda: reference_covariance(joint, source, context.manifest))

        def analyse(samples: Sequence[Sample], images: Sequence[Image]) -> Rows:
            return {"bias_answers": Perturber(joint, settings, moves, varying()).rows(samples, images)}

        return analyse

    def merge(self, plan: Plan[JointContext], parts: Parts, output: Output) -> dict[str, Any]:
        """Write the answers, and how they shift."""
        answers, settings = parts.table("bias_answers"), self.settings
        table = bias_table(answers, settings.pairs, settings.draws, settings.seed)
        output.table("bias_answers", answers)
        output.table("bias", table)
        return {"rows": len(answers), "measures": table.to_pylist()}
