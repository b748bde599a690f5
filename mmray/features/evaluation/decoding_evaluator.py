"""Measure another decoding in an edit's place: the model's own replies about images, and those by the decoding.

What is measured teacher-forced, and texts without an image, do not depend on the decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmray.data.samples import Sample
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.edit_requests import OTHER
from mmray.features.evaluation.evaluator import Drafts, EditEvaluator, caption_row
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import TextChange
from mmray.features.evaluation.settings import MeasureSettings
from mmray.models.decodings import DECODINGS, Decoding
from mmray.models.generation import check_decoding
from mmray.objects.statistics import ObjectStatistics


@dataclass(frozen=True)
class MeasuredDecoding:
    """A decoding in an edit's place: it has no purpose of its own, and changes no weight."""

    decoding: Decoding

    @property
    def purposes(self) -> Sequence[Any]:
        """None: it is not about words."""
        return ()

    @property
    def facts(self) -> dict[str, Any]:
        """Which it is."""
        definition = DECODINGS[self.decoding.name].definition
        return {"decoding": str(self.decoding), "definition": definition}

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Leave the model as it is."""
        yield


class DecodingEvaluator(EditEvaluator):
    """Measures replies about images by a decoding against the model's own.

    Raises InputError for a decoding that the model's family can't have.
    """

    def __init__(
        self,
        baseline: BaselineReplies,
        measured: MeasuredDecoding,
        statistics: ObjectStatistics,
        settings: MeasureSettings,
    ) -> None:
        super().__init__(baseline, measured, statistics, settings)
        self.decoding = measured.decoding
        check_decoding(baseline.model, self.decoding)

    def _measured(self, samples: Sequence[Sample], own: bool) -> MeasurementBuffer:
        drafts: Drafts = {}
        common = [self._common(sample, own, drafts) for sample in samples]
        replies = self._reply([query for one in common for query in (one.caption, *one.pope.values())], drafts)
        verifier = self.baseline.verifier
        # Drafts can't be verified: the likeliest tokens along them are those of the model alone.
        after = verifier.generate([query for query, _ in replies], self.decoding)
        pairs = zip(replies, after, strict=True)
        found = {query.key: TextChange(reply.text, verifier.text(tokens)) for (query, reply), tokens in pairs}
        rows = MeasurementBuffer(images={sample.sample_id: sample.image_key for sample in samples})
        for one in common:
            rows.captions.append(caption_row(one.sample, found[one.caption.key], OTHER))
            self._add_quality(rows, one, found)
        self._add_similarity(rows, common, found)
        return rows
