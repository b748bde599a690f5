"""The worker's part of the properties: measures concepts and draws their maps with one model replica."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from functools import partial

from mmray.data.samples import Sample
from mmray.engine.clock import phase
from mmray.features.properties.captions import CaptionChanges, regenerated
from mmray.features.properties.comparison import Comparison
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
from mmray.features.properties.subject import ConceptInputs, Study, Subject
from mmray.models.encoder import Encoder
from mmray.neurons.split_on_oom import FAILURES, split_on_failure


class Probe:
    """Measures concepts one by one, and draws their maps together.

    Raises InputError if the text encoder or CLIP can't be loaded.
    """

    def __init__(self, study: Study, settings: PropertySettings) -> None:
        self.study = study
        device = study.model.device
        self.encoder = Encoder(settings.encoder, device) if settings.encoder else None
        self.clip = Clip(settings.clip, device) if settings.clip else None
        self.caption_changes = CaptionChanges()
        self.resumes: bool | None = None
        """Whether forward passes may resume from recorded states; the first concept's ablator finds out."""

    def unit(self, unit: Sequence[ConceptInputs], samples: Mapping[str, Sample], found: Observations) -> None:
        """Measure concepts on their images among these samples, and draw maps. A failure is a row of `errors`."""
        for inputs in unit:
            if inputs.own:
                self._concept(inputs, samples, found)
        mapped = [inputs for inputs in unit if inputs.maps]
        # Concepts share forward passes, so a failure is halved down to the concept that causes it.
        for drawn in split_on_failure(
            mapped,
            lambda part: phase("maps")(draw_maps)(self.study, part, samples),
            lambda inputs, problem: found.fail(inputs.concept, f"heat maps: {problem}"),
            errors=FAILURES,
        ):
            found.observations += drawn.observations
            found.heatmaps += drawn.heatmaps

    def _concept(self, inputs: ConceptInputs, samples: Mapping[str, Sample], found: Observations) -> None:
        complete = len(found.observations)
        try:
            self._measure(inputs, samples, found)
        except FAILURES as error:
            # With half of its rows, a concept would count for some methods and not for their controls.
            del found.observations[complete:]
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.fail(inputs.concept, f"{type(error).__name__}: {error} ({where.name})")

    def _measure(self, inputs: ConceptInputs, samples: Mapping[str, Sample], found: Observations) -> None:
        chosen = [samples[name] for name in (*inputs.own, *inputs.others) if name in samples]
        encoded = self.study.encoded(chosen, partial(found.leave_out, inputs.concept))
        subject = Subject(self.study, inputs, *encoded) if encoded is not None else None
        if subject is None or not subject.usable:
            found.fail(inputs.concept, "fewer than two images of the concept, or no image of others, can be used")
            return
        sensitivity(subject, found)
        if self.encoder is not None:
            text_similarity(subject, found, self.encoder)
        if self.clip is not None:
            image_similarity(subject, found, self.clip)
        with phase("write"):
            again = regenerated(subject)
        region_invariance(subject, again, found)
        invariance(subject, found)
        specificity(subject, found)
        with phase("ablate"):
            effects = AblationEffects(subject, self.resumes)
            self.resumes = effects.ablator.resumes
            effects.observe(found)
        Comparison(subject, again, found, self.encoder, self.clip).observe(self.resumes)
        with phase("write"):
            self.caption_changes.observe(subject, found)
