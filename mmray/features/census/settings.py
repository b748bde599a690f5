"""Settings of a census. Each docstring is also the help of the command line, so it stays short."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mmray.data.samples import BACKGROUND
from mmray.engine.settings import JobSettings, checked, execution, known_by_digest
from mmray.models.options import LONGEST, Dtype, Module
from mmray.neurons.scores import Pieces, Score, scores_help

Captions = Literal["dataset", "generate"]


class CensusSettings(JobSettings):
    """Settings of `mmray census`."""

    model: str = known_by_digest()
    """Hugging Face checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """`demo`, Parquet (file, folder or glob), WebDataset tars, image folder with metadata, COCO captions JSON, or
    `hf:NAME[:SPLIT]`; local or s3://."""
    out: str = execution()
    """Folder of the run: a local path or s3://bucket/prefix."""
    limit: int | None = Field(None, ge=1)
    """Use only the first N samples; default: all."""
    shard_size: int = Field(500, ge=1)
    """Samples per shard. A shard is the unit of work, and what a crash costs."""
    batch_size: int = execution(32, ge=1)
    """Samples per forward pass; halved automatically when memory runs out."""
    captions: Captions = "dataset"
    """Score the captions in the data (dataset), or captions that the model writes (generate)."""
    longest: int = Field(LONGEST, ge=1)
    """Most tokens in a caption that the model writes; longer ones are cut off."""
    prompt: str | None = None
    """Question before the caption; default: "Describe the image in few words." in the caption's language."""
    prefix: str | None = None
    """Words that every answer starts with, such as "An image of"; default: none."""
    score: Score = Field("contribution", description=scores_help())
    fold_norm: bool = False
    """Give contributions in logits after the final norm, with its gain and its scale at the position applied."""
    pieces: Pieces = "first"
    """Score a noun of several tokens at its first token, or as the sum over all its tokens."""
    top_k: int = Field(20, ge=1)
    """Neurons listed per occurrence; `share` counts these."""
    candidates: int | None = Field(None, ge=1)
    """Neurons per concept that each shard keeps for the merge; more certify more ranks. Default: all of up to 16,384
    neurons, 2,048 of more."""
    nouns: str = known_by_digest("auto")
    """Source of concepts: objects (the data's column), hanta (English, German), textblob (English), or a lexicon FILE.
    auto: objects if the data has them, else hanta."""
    module: Module = "language"
    """Also count the vision tower's or the projector's neurons, in the table `activity`."""
    dtype: Dtype = "auto"
    """Number format of the model; auto: the checkpoint's on a GPU, fp32 on a CPU. Scores are always fp32."""
    image_column: str | None = None
    """Column of the image; default: found by its usual names, like all columns."""
    caption_column: str | None = None
    """Column of the caption, or of a list of captions, each one a sample; default: found by name."""
    id_column: str | None = None
    """Column of the sample id; default: found by name, else a digest of image and caption."""
    language_column: str | None = None
    """Column of the caption's language (en, es, …); default: found by name."""
    language: str | None = None
    """Language (en, es, …) of captions without one in the data; default: guessed from each caption."""
    domain_column: str | None = None
    """Column of the image's domain; default: found by name."""
    objects_column: str | None = None
    """Column with the list of objects in the image; default: found by name."""
    boxes_column: str | None = None
    """Column of the objects' boxes, (x, y, width, height) in 0..1; default: found by name. none: no boxes."""
    questions_column: str | None = None
    """Column of (question, answer) pairs; default: found by name. none: no questions."""
    label_column: list[str] | None = None
    """Column whose values label samples, for `mmray selectivity`; repeatable; default: none."""
    background: str = BACKGROUND
    """Colour behind transparent pixels: a name, or #rrggbb."""
    trust_remote_code: bool = execution(False)
    """Allow the checkpoint to run its own Python code."""

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
        return found


def census_settings(values: dict[str, Any]) -> CensusSettings:
    """Return validated settings. Raises InputError that names the first wrong setting and what it may be."""
    return checked(CensusSettings, values)
