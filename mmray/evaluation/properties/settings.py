"""Typed settings of the properties, the documentation of each, and what is fixed because protocols name it."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.errors import InputError
from mmray.settings import Workers, first_problem

SIZES = (1, 10, 50, 100)
"""Neurons zeroed: the dose."""
INVARIANCE_SIZES = (1, 5, 10, 50, 100)
"""Neurons whose sets are compared."""
DECODED = 10
"""Neurons whose tokens are read, and whose activations make a map."""
MOST = max(SIZES)
SIGMAS = (1.0, 2.0)
"""Deviation of the noise on the rows of W_out, in parts of the rows' own root mean square."""
FACTORS = (2.0, 5.0)
"""What activations are multiplied by to amplify them."""
WRITTEN = 3
"""Images of a concept, and as many others, that are captioned anew with neurons changed."""
RANKINGS = ("score", "specific")
"""The run's orders whose neurons are measured."""


class PropertySettings(BaseModel):
    """Everything that `mmray properties` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: str
    """Folder of the run."""
    only: Literal["maps", "properties"] | None = None
    """Draw heat maps, or measure properties, alone; by default both."""
    concepts: int = Field(200, ge=1)
    """Concepts that are measured, the most frequent first."""
    min_occurrences: int = Field(5, ge=2)
    """Images that must show a concept for it to be measured."""
    language: str | None = None
    """Measure the concepts of captions in this language alone, such as en; by default of all."""
    images: int = Field(6, ge=2)
    """Images of a concept, which run in one batch with half as many of others."""
    maps: int = Field(4, ge=1)
    """Images of a concept with heat maps."""
    longest: int = Field(32, ge=1)
    """Tokens at most in a caption that is written anew; a longer one is cut off there."""
    encoder: str | None = None
    """Folder of a text encoder for BERTScore of decoded tokens; default: not measured."""
    clip: str | None = None
    """Folder of a CLIP checkpoint for CLIPScore of decoded tokens; default: not measured."""
    draws: int = Field(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    seed: int = 0
    """Seed of all that is drawn."""
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
        return self.model_dump(exclude=EXECUTION)

    def fingerprint(self, digests: dict[str, str]) -> str:
        """Return a digest of all that the rows depend on; the same for every way of doing the work."""
        facts = self.result_settings() | {"digests": digests}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


EXECUTION = {"run", "draws", "workers", "gpus_per_worker", "address", "retry_failed"}
"""Settings that say how the work is done, or come after it."""


def property_settings(values: dict[str, Any]) -> PropertySettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    try:
        return PropertySettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
