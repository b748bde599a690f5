"""Settings of `mmray saliency`, each with its documentation."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest


class SaliencySettings(JobSettings):
    """All settings of `mmray saliency RUN`."""

    run: str = execution()
    """Folder of the run."""
    detector: str | None = known_by_digest(None)
    """Detector next to the model: `demo`, a folder of heads for the model's own tower, or an OWL-ViT or OWLv2 (folder
    or hub id) with --alignment. Default: the demo's for the demo model, else none."""
    alignment: str | None = known_by_digest(None)
    """Folder of the network from an OWL-ViT's embedding to the model's image tokens."""
    methods: str | None = None
    """Methods, comma-separated: alignment, alignment-boxes, alignment-any, gradient, gradient-input,
    detector, rollout, neurons, random, random-patches, centre. Default: all, or without a detector those that need
    none."""
    images: int = Field(200, ge=1)
    """Images with boxes of objects, with which maps are compared."""
    min_objects: int = Field(2, ge=1)
    """Different objects that an image needs. 1: images of a single object too, such as CUB's; compare with `centre`
    there, because the only object is often in the middle."""
    maps: int = Field(24, ge=0)
    """Images whose maps the report shows."""
    erasures: bool = False
    """Measure insertion and deletion too: 14 forward passes per word and method. Everything else takes one forward and
    one backward pass per word."""
    draws: int = after_work(1000, ge=1)
    """Bootstrap draws over images, for intervals."""
    seed: int = 0
    """Seed of the choice of images."""


def saliency_settings(values: dict[str, Any]) -> SaliencySettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    return checked(SaliencySettings, values)
