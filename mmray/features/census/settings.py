"""Typed settings of a census, the documentation of each, and the fingerprint that a run keeps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from mmray.data.samples import BACKGROUND
from mmray.engine.settings import JobSettings, checked, execution, known_by_digest
from mmray.models.options import LONGEST, Dtype, Module
from mmray.neurons.scores import Pieces, Score, scores_help

Captions = Literal["dataset", "generate"]


class CensusSettings(JobSettings):
    """Everything that `mmray census` can be told."""

    model: str = known_by_digest()
    """Hugging Face checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """`demo`, Parquet file, folder or glob, WebDataset tars, image folder with metadata, COCO captions JSON, or
    `hf:NAME[:SPLIT]`; local or s3://."""
    out: str = execution()
    """Folder of the run: a local path or s3://bucket/prefix."""
    limit: int | None = Field(None, ge=1)
    """Use the first N samples only; all by default."""
    shard_size: int = Field(500, ge=1)
    """Samples a shard: the unit of work, and what a crash costs."""
    batch_size: int = execution(32, ge=1)
    """Samples a forward pass; halved by itself where memory runs out."""
    captions: Captions = "dataset"
    """Score the data's captions (dataset), or what the model itself writes (generate)."""
    longest: int = Field(LONGEST, ge=1)
    """Tokens at most in a caption that the model writes; a longer one is cut off there."""
    prompt: str | None = None
    """Question before the caption; default: "Describe the image in few words." in the caption's language."""
    prefix: str | None = None
    """Words that every answer is made to begin with, by default none; as published: "An image of". A caption that
    begins with them already is not given them twice, and a generated one is what the model writes behind them."""
    score: Score = Field("contribution", description=scores_help())
    fold_norm: bool = False
    """Contributions in logits after the final norm: its gain and the root mean square at the position are applied. That
    is the neuron's share of the logit with the norm's scale held; ablating a high one takes about half of it, since the
    scale grows (see --score effect)."""
    pieces: Pieces = "first"
    """A noun of several tokens is scored at its first, or by the sum over all of them: its whole log-probability."""
    top_k: int = Field(20, ge=1)
    """Neurons listed with each occurrence; `share` counts these."""
    candidates: int | None = Field(None, ge=1)
    """Neurons a concept that each shard keeps for the merge; more certify more ranks. Default: all of up to 16,384
    neurons, 2,048 of more."""
    nouns: str = known_by_digest("auto")
    """Where concepts come from: objects (the data's column), hanta (tagger of English and German), textblob (English
    tagger), a lexicon FILE with a noun, and after a tab optionally its language, per line; auto: objects where the data
    has them, else hanta."""
    module: Module = "language"
    """Count the vision tower's or the projector's neurons too, in `activity`; scores are of the language decoder."""
    dtype: Dtype = "auto"
    """Number format of the model; auto: the checkpoint's on a GPU, fp32 on a CPU. Scores are always fp32."""
    image_column: str | None = None
    """Column of the image; by default found by its usual names, as the other columns are."""
    caption_column: str | None = None
    """Column of the caption, or of a list of them, each of which is a sample; by default found by its usual names."""
    id_column: str | None = None
    """Column of the sample id; by default found by its usual names, else a digest of image and caption."""
    language_column: str | None = None
    """Column of the caption's language (en, es, …); by default found by its usual names."""
    language: str | None = None
    """Language (en, es, …) of captions for which no column gives one; default: none, and a tagger of nouns takes the
    language that a caption looks like."""
    domain_column: str | None = None
    """Column of the image's domain; by default found by its usual names."""
    objects_column: str | None = None
    """Column with the list of objects in the image; by default found by its usual names."""
    boxes_column: str | None = None
    """Column of the objects' boxes, (x, y, width, height) in 0..1; by default found by its usual names; none: leave
    boxes out."""
    questions_column: str | None = None
    """Column of (question, answer) pairs; by default found by its usual names; none: leave questions out."""
    label_column: list[str] | None = None
    """Further column whose values label samples, for `mmray selectivity`; may be given more than once, by default
    none."""
    background: str = BACKGROUND
    """Colour behind transparent pixels of images: a name, or #rrggbb."""
    trust_remote_code: bool = execution(False)
    """Allow the checkpoint to run its own Python code. Off: only architectures of transformers."""

    @field_validator("out")
    @classmethod
    def _check_out(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("give a folder, or s3://bucket/prefix")
        return value

    @field_validator("background")
    @classmethod
    def _check_background(cls, value: str) -> str:
        from PIL.ImageColor import getrgb

        try:
            opaque = len(getrgb(value)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError("not an opaque colour; give a name such as white, or #rrggbb")
        return value

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that a shard's result depends on, without those that name something."""
        # The data's captions are never cut off.
        unused = {"longest"} if self.captions == "dataset" else set()
        return {name: value for name, value in super().result_settings().items() if name not in unused}


def census_settings(values: dict[str, Any]) -> CensusSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(CensusSettings, values)
