"""Settings of a census. Each docstring is also the help of the command line, so it stays short."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mmray.data.samples import BACKGROUND
from mmray.engine.settings import JobSettings, checked, execution, known_by_digest
from mmray.models.options import LONGEST, Dtype, Module
from mmray.neurons.scores import Pieces, Score, scores_help

Captions = Literal["dataset", "generate"]

LEAST_PER_SHARD, MOST_PER_SHARD = 500, 4_000
NEURONS_PER_SAMPLE = 64
"""Neurons per sample of a shard. However few samples it has, a shard writes about 100 bytes per neuron."""


class CensusSettings(JobSettings):
    """Settings of `mmray census`."""

    model: str = known_by_digest()
    """Hugging Face checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """`demo`, Parquet, WebDataset tars, image folder, COCO JSON, JSON lines or CSV, or `hf:NAME[:SPLIT]`. Parquet is a
    file, folder or glob; an image folder has metadata. Local or s3://."""
    out: str = execution()
    """Folder of the run: a local path or s3://bucket/prefix."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N samples; default: all."""
    shard_size: int | None = Field(None, ge=1)
    """Samples per shard; default: 500, or more for a large model. A shard is the unit of work, and what a crash costs.
    Models of more than 32,000 neurons have one sample per 64 neurons, at most 4,000."""
    batch_size: int = execution(32, ge=1)
    """Samples per forward pass. Halved automatically when memory runs out."""
    captions: Captions = "dataset"
    """Whose captions to score: the data's, or those that the model writes."""
    longest: int = Field(LONGEST, ge=1)
    """Most tokens in a caption that the model writes. Longer ones are cut off."""
    prompt: str | None = None
    """Question before the caption; default: to describe the image. It is "Describe the image in few words."
    in the caption's language. In data with a question column it follows that question; default there: nothing."""
    prefix: str | None = None
    """Words that every answer starts with, such as "An image of"."""
    window: int | None = Field(None, ge=32)
    """Most tokens of a text without an image that are read at once; default: 2,048, or the model's context if less.
    Longer texts are cut into windows, each a sample."""
    score: Score = Field("contribution", description=scores_help())
    fold_norm: bool = False
    """Give contributions in logits after the final norm. Its gain and its scale at the position are applied."""
    pieces: Pieces = "first"
    """Score a noun at its first token, or sum over its tokens."""
    top_k: int = Field(20, ge=1)
    """Neurons listed per occurrence; `share` counts these."""
    candidates: int | None = Field(None, ge=1)
    """Neurons per concept that each shard keeps for the merge. More certify more ranks. Default: all of up to 16,384
    neurons, 2,048 of more."""
    nouns: str = known_by_digest("auto")
    """Source of concepts: auto, objects, hanta, textblob, FILE. objects: the data's column; hanta: a
    tagger of English and German; textblob: one of English. auto: objects if the data has them, else hanta."""
    module: Module = "language"
    """Module whose neurons are also counted, in the table `activity`."""
    dtype: Dtype = "auto"
    """Number format of the model. auto: the checkpoint's on a GPU, fp32 on a CPU. Scores are always fp32.

    Quantised weights stay as they are with auto; with another format they are dequantised.
    """
    image_column: str | None = None
    """Column of the image; default: found by its usual names."""
    caption_column: str | None = None
    """Column of the caption; default: found by name. Of a list of captions, each one is a sample."""
    id_column: str | None = None
    """Column of the sample id; default: found by name, else a digest. The digest is of image and caption."""
    language_column: str | None = None
    """Column of the caption's language (en, es, …); default: found by name."""
    language: str | None = None
    """Language (en, es, …) of captions without one; default: guessed."""
    domain_column: str | None = None
    """Column of the image's domain; default: found by name."""
    objects_column: str | None = None
    """Column of the objects in the image; default: found by name."""
    boxes_column: str | None = None
    """Column of the objects' boxes; default: found by name. A box is (x, y, width, height) in 0..1. none: no boxes."""
    questions_column: str | None = None
    """Column of (question, answer) pairs; default: found by name. none: no questions."""
    label_column: list[str] | None = None
    """Column whose values label samples; repeatable. For `mmray selectivity`."""
    background: str = BACKGROUND
    """Colour behind transparent pixels: a name, or #rrggbb."""
    trust_remote_code: bool = execution(False)
    """Allow the checkpoint to run its own Python code."""

    @property
    def samples_per_shard(self) -> int:
        """`shard_size`; a job settles it by the model's neurons before it cuts the data."""
        return self.shard_size or LEAST_PER_SHARD

    @field_validator("out")
    @classmethod
    def _check_out(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("give a folder, or s3://bucket/prefix")
        return value

    @field_validator("background")
    @classmethod
    def _check_background(cls, value: str) -> str:
        # Imported here because reading results needs the settings, but no image library.
        from PIL.ImageColor import getrgb

        try:
            opaque = len(getrgb(value)) == 3  # four numbers would have an alpha channel
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError("not an opaque colour; give a name such as white, or #rrggbb")
        return value

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that a shard's result depends on, except those known by their digest."""
        found = super().result_settings()
        if self.captions == "dataset":
            # Only generated captions are cut off, so another value must not make a finished run refuse to resume.
            del found["longest"]
        if self.window is None:
            # Runs of versions without windows go on.
            del found["window"]
        return found


def shard_size_of(neurons: int) -> int:
    """Return the default samples per shard for a model with so many neurons; 4,000 for LLaVA-1.5-7B."""
    return min(MOST_PER_SHARD, max(LEAST_PER_SHARD, neurons // NEURONS_PER_SAMPLE))


def census_settings(values: dict[str, Any]) -> CensusSettings:
    """Return validated settings. Raises InputError that names the first wrong setting and what it may be."""
    return checked(CensusSettings, values)
