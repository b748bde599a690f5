"""Typed settings of saliency, and the documentation of each."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest


class SaliencySettings(JobSettings):
    """Everything that `mmray saliency RUN` can be told."""

    run: str = execution()
    """Folder of the run."""
    detector: str | None = known_by_digest(None)
    """Detector on the model's sight: `demo`, a folder of heads for the model's own tower, or an OWL-ViT or OWLv2
    (folder or hub id) with --alignment; by default that of the demo where it is the model, else none."""
    alignment: str | None = known_by_digest(None)
    """Folder of the network that makes the model's image tokens of an OWL-ViT's embedding."""
    methods: str | None = None
    """What draws the maps, comma-separated: alignment, alignment-boxes, alignment-any, gradient, gradient-input,
    detector, rollout, neurons, random, random-patches; by default all, without a detector those that need none."""
    images: int = Field(200, ge=1)
    """Images of several objects, with their boxes, that maps are held against."""
    maps: int = Field(24, ge=0)
    """Images whose maps are kept for the report."""
    erasures: bool = False
    """Measure insertion and deletion too: 14 forwards a word and method, where all else takes a forward and a backward
    a word; off by default."""
    draws: int = after_work(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    seed: int = 0
    """Seed of the choice of images."""


def saliency_settings(values: dict[str, Any]) -> SaliencySettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(SaliencySettings, values)
