"""All that is measured of concepts, by one model replica."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from functools import partial

from mmray.data.samples import Sample
from mmray.engine.clock import phase
from mmray.features.properties.comparing import compare_methods
from mmray.features.properties.effects import AblationEffects
from mmray.features.properties.maps import draw_maps
from mmray.features.properties.meaning import (
    Clip,
    image_similarity,
    invariance,
    region_invariance,
    sensitivity,
    specificity,
    text_similarity,
)
from mmray.features.properties.observations import Observations
from mmray.features.properties.settings import PropertySettings
from mmray.features.properties.subject import Facts, Study, Subject
from mmray.features.properties.writing import Writing
from mmray.models.encoder import Encoder
from mmray.neurons.split_on_oom import FAILURES, split_on_failure


class Probe:
    """Measures concepts one by one, and draws their maps together.

    Raises InputError for an encoder or a CLIP that can't be loaded.
    """

    def __init__(self, study: Study, settings: PropertySettings) -> None:
        self.study = study
        device = study.model.device
        self.encoder = Encoder(settings.encoder, device) if settings.encoder else None
        self.clip = Clip(settings.clip, device) if settings.clip else None
        self.writing = Writing()
        self.resumes: bool | None = None

    def unit(self, unit: Sequence[Facts], samples: Mapping[str, Sample], found: Observations) -> None:
        """Measure concepts on their images among these samples, and draw maps; what fails is a row of `errors`."""
        for facts in unit:
            if facts.own:
                self._concept(facts, samples, found)
        mapped = [facts for facts in unit if facts.maps]
        for drawn in split_on_failure(
            mapped,
            lambda part: phase("maps")(draw_maps)(self.study, part, samples),
            lambda facts, problem: found.fail(facts.concept, f"heat maps: {problem}"),
            errors=FAILURES,
        ):
            found.observations += drawn.observations
            found.heatmaps += drawn.heatmaps

    def _concept(self, facts: Facts, samples: Mapping[str, Sample], found: Observations) -> None:
        before = len(found.observations)
        try:
            self._measure(facts, samples, found)
        except FAILURES as error:
            # Half a concept's rows would make other concepts' controls weigh more.
            del found.observations[before:]
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.fail(facts.concept, f"{type(error).__name__}: {error} ({where.name})")

    def _measure(self, facts: Facts, samples: Mapping[str, Sample], found: Observations) -> None:
        chosen = [samples[name] for name in (*facts.own, *facts.others) if name in samples]
        encoded = self.study.encoded(chosen, partial(found.leave_out, facts.concept))
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
        with phase("ablate"):
            effects = AblationEffects(subject, self.resumes)
            self.resumes = effects.ablator.resumes
            effects.observe(found)
        compare_methods(subject, effects, found)
        with phase("write"):
            self.writing.observe(subject, found)
