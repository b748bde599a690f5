"""Typed settings of the properties, the documentation of each, and what is fixed because protocols name it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmray.engine.settings import JobSettings, after_work, checked, execution

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


class PropertySettings(JobSettings):
    """Everything that `mmray properties` can be told."""

    run: str = execution()
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
    draws: int = after_work(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    seed: int = 0
    """Seed of all that is drawn."""


def property_settings(values: dict[str, Any]) -> PropertySettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(PropertySettings, values)
