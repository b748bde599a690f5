"""A detector for a model that is measured already: how sure it is of what captions name."""

from __future__ import annotations

from collections.abc import Collection

from PIL.Image import Image

from mmray.detector.joint import judge_beside
from mmray.features.hallucination.perturb import confidences
from mmray.models.loading import LoadedModel


class SecondOpinion:
    """A detector on the model's own tower, or with a sight of its own. Raises InputError as `judge_beside` does."""

    def __init__(self, model: LoadedModel, detector: str) -> None:
        self.judge = judge_beside(model, detector)

    def confidence(self, image: Image, words: Collection[str]) -> dict[str, float]:
        """Return word → the highest probability of any box."""
        if not words:
            return {}
        asked = sorted(words)
        embedding = self.judge.embed(self.judge.pixels([image]))
        return dict(zip(asked, confidences(self.judge, embedding, asked)[0].tolist(), strict=True))
