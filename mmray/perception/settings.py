"""Typed settings of saliency, and the documentation of each."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.errors import InputError
from mmray.settings import Workers, first_problem

EXECUTION = {"run", "draws", "workers", "gpus_per_worker", "address", "retry_failed"}
"""Settings that say how the work is done, or come after it."""
NAMED = {"detector", "alignment"}
"""Settings known by the digests of what they name."""


class SaliencySettings(BaseModel):
    """Everything that `mmray saliency RUN` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: str
    """Folder of the run."""
    detector: str | None = None
    """Detector on the model's sight: `demo`, a folder of heads for the model's own tower, or an OWL-ViT or OWLv2
    (folder or hub id) with --alignment; by default that of the demo where it is the model, else none."""
    alignment: str | None = None
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
    draws: int = Field(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    seed: int = 0
    """Seed of the choice of images."""
    workers: Workers = None
    """Actors, each with a model replica: a number, or MIN:MAX to let Ray add and remove some. Default: one a GPU of the
    cluster; without GPUs one a core, at most four a machine."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker; default: 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to join (auto, or ray://HOST:PORT); default: a local Ray of this process."""
    retry_failed: bool = False
    """Try again what an earlier call set aside."""

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that the rows of a unit depend on."""
        return self.model_dump(exclude=EXECUTION | NAMED)

    def fingerprint(self, digests: dict[str, str]) -> str:
        """Return a digest of all that the rows depend on; the same for every way of doing the work."""
        facts = self.result_settings() | {"digests": digests}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def saliency_settings(values: dict[str, Any]) -> SaliencySettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    try:
        return SaliencySettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
