"""Settings of the properties, and constants that are fixed because the protocols of measures name them.

Each docstring of a setting is also the help of the command line, so it stays short.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest

SIZES = (1, 10, 50, 100)
"""Numbers of neurons that are zeroed."""
INVARIANCE_SIZES = (1, 5, 10, 50, 100)
"""Sizes of the sets of neurons that are compared across images."""
DECODED = 10
"""Neurons whose tokens are read, and whose activations make a map."""
MOST = max(SIZES)
SIGMAS = (1.0, 2.0)
"""Standard deviations of the noise on rows of W_out, as a fraction of the rows' own RMS."""
FACTORS = (2.0, 5.0)
"""Factors that amplify activations."""
CAPTIONED = 3
"""Images of a concept, and as many others, that are captioned again with neurons changed."""
RANKINGS = ("score", "specific")
"""Rankings of the run whose neurons are measured."""


class PropertySettings(JobSettings):
    """Settings of `mmray properties`."""

    run: str = execution()
    """Folder of the run."""
    held_out: str | None = known_by_digest(None)
    """Run of other data with the same model, whose images are measured; default: the run's own, in-sample."""
    only: Literal["maps", "properties"] | None = None
    """Only draw heat maps, or only measure; default: both."""
    concepts: int = Field(200, ge=1)
    """Concepts to measure, the most frequent first."""
    min_occurrences: int = Field(5, ge=2)
    """Images that a concept needs to be measured."""
    language: str | None = None
    """Only measure concepts of captions in this language, such as en; default: all."""
    images: int = Field(6, ge=2)
    """Images per concept; they run in one batch with half as many of other concepts."""
    maps: int = Field(4, ge=1)
    """Images per concept with heat maps."""
    longest: int = Field(32, ge=1)
    """Most tokens in a caption that the model writes; longer ones are cut off."""
    encoder: str | None = None
    """Folder of a text encoder for BERTScore of decoded tokens; default: not measured."""
    clip: str | None = None
    """Folder of a CLIP checkpoint for CLIPScore of decoded tokens; default: not measured."""
    draws: int = after_work(1000, ge=1)
    """Bootstrap draws over images for the intervals."""
    seed: int = 0
    """Seed of everything drawn at random."""


def property_settings(values: dict[str, Any]) -> PropertySettings:
    """Return validated settings. Raises InputError that names the first wrong setting and what it may be."""
    return checked(PropertySettings, values)
