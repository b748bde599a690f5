"""All that is measured of one concept, by one model replica."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

from mmray.datasets.samples import Sample
from mmray.evaluation.properties.comparing import compare_methods
from mmray.evaluation.properties.effects import Effects
from mmray.evaluation.properties.maps import draw_maps
from mmray.evaluation.properties.meaning import (
    Clip,
    image_similarity,
    invariance,
    region_invariance,
    sensitivity,
    specificity,
    text_similarity,
)
from mmray.evaluation.properties.observations import Observations
from mmray.evaluation.properties.settings import PropertySettings
from mmray.evaluation.properties.subject import Facts, Study, Subject
from mmray.evaluation.properties.writing import Writing
from mmray.evaluation.quality import Encoder
from mmray.neurons.halving import FAILURES


class Probe:
    """Measures concepts one by one; raises InputError for an encoder or a CLIP that can't be loaded."""

    def __init__(self, study: Study, settings: PropertySettings) -> None:
        self.study = study
        device = study.model.device
        self.encoder = Encoder(settings.encoder, device) if settings.encoder else None
        self.clip = Clip(settings.clip, device) if settings.clip else None
        self.writing = Writing()
        self.resumes: bool | None = None

    def concept(self, facts: Facts, samples: Mapping[str, Sample], found: Observations) -> None:
        """Measure a concept on its images among these samples; what fails is a row of `errors`."""
        before = len(found.observations), len(found.heatmaps)
        try:
            if facts.own:
                self._measure(facts, samples, found)
            if facts.maps:
                draw_maps(self.study, facts, [samples[name] for name in facts.maps if name in samples], found)
        except FAILURES as error:
            # Half a concept's rows would make other concepts' controls weigh more.
            del found.observations[before[0] :], found.heatmaps[before[1] :]
            where = traceback.extract_tb(error.__traceback__)[-1]
            message = " ".join(f"{type(error).__name__}: {error} ({where.name})".split())[:500]
            found.errors.append(
                {
                    "sample_id": None,
                    "source": facts.concept,
                    "shard_id": None,
                    "stage": "properties",
                    "message": message,
                }
            )

    def _measure(self, facts: Facts, samples: Mapping[str, Sample], found: Observations) -> None:
        encoded = self.study.encoded([samples[name] for name in (*facts.own, *facts.others) if name in samples])
        subject = Subject(self.study, facts, *encoded) if encoded is not None else None
        if subject is None or not subject.usable:
            raise ValueError("fewer than two of its images, or none of others, can be used")
        sensitivity(subject, found)
        if self.encoder is not None:
            text_similarity(subject, found, self.encoder)
        if self.clip is not None:
            image_similarity(subject, found, self.clip)
        region_invariance(subject, found)
        invariance(subject, found)
        specificity(subject, found)
        effects = Effects(subject, self.resumes)
        self.resumes = effects.ablator.resumes
        effects.observe(found)
        compare_methods(subject, effects, found)
        self.writing.observe(subject, found)
