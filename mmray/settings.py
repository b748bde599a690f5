"""Typed settings of a census, the documentation of each, and the fingerprint that a run keeps."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from mmray.errors import InputError

Captions = Literal["dataset", "generate"]
Score = Literal["contribution", "gate", "activation", "gradient", "gradient-last", "effect", "random"]
Pieces = Literal["first", "sum"]
Module = Literal["language", "vision", "projector"]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]

BACKGROUND = "white"
"""What shows behind transparent pixels."""
UNITS: dict[str, str] = {
    "contribution": "logits before the final norm",
    "gate": "logits before the final norm",
    "activation": "",
    "gradient": "logits",
    "gradient-last": "logits",
    "effect": "log-odds",
    "random": "",
}
"""Unit of each score; an activation has none, nor has a random number."""
FOLDED = "logits after the final norm"
LONGEST = 64
"""Tokens at most in a generated caption, where nothing else is asked for."""

EXECUTION = frozenset(
    {"out", "workers", "gpus_per_worker", "batch_size", "address", "local", "retry_failed", "trust_remote_code"}
)
"""Settings that say how the work is done and leave the result alone; a run may be continued with others."""


def _check_workers(value: Any) -> Any:
    if value is None:
        return None
    least, colon, most = str(value).partition(":")
    if not (least.isdecimal() and int(least) >= 1 and (not colon or (most.isdecimal() and int(least) <= int(most)))):
        raise ValueError("give a number of at least 1, or MIN:MAX such as 2:16")
    return str(value)


Workers = Annotated[str | None, BeforeValidator(_check_workers)]
"""How many actors there are: a number, or MIN:MAX to let Ray add and remove some; None: as many as fit."""


def worker_range(workers: str | None) -> tuple[int, int] | None:
    """Return the fewest and the most workers, where that was asked for."""
    if workers is None:
        return None
    least, _, most = workers.partition(":")
    return int(least), int(most or least)


class CensusSettings(BaseModel):
    """Everything that `mmray census` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Hugging Face checkpoint folder, hub id, or `demo`."""
    data: str
    """`demo`, Parquet file, folder or glob, WebDataset tars, image folder with metadata, COCO captions JSON, or
    `hf:NAME[:SPLIT]`; local or s3://."""
    out: str
    """Folder of the run: a local path or s3://bucket/prefix."""
    limit: int | None = Field(None, ge=1)
    """Use the first N samples only; all by default."""
    shard_size: int = Field(500, ge=1)
    """Samples a shard: the unit of work, and what a crash costs."""
    batch_size: int = Field(32, ge=1)
    """Samples a forward pass; halved by itself where memory runs out."""
    workers: Workers = None
    """Actors, each with a model replica: a number, or MIN:MAX to let Ray add and remove some as work and machines
    allow. Default: one a GPU of the cluster; without GPUs one a core, at most four a machine, each with its part of the
    cores as threads."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker: 2 or more share one replica; default: 1 where the cluster has GPUs, else 0."""
    captions: Captions = "dataset"
    """Score the data's captions (dataset), or what the model itself writes (generate)."""
    longest: int = Field(LONGEST, ge=1)
    """Tokens at most in a caption that the model writes; a longer one is cut off there."""
    prompt: str | None = None
    """Question before the caption; default: "Describe the image in few words." in the caption's language."""
    prefix: str | None = None
    """Words that every answer is made to begin with, by default none; as published: "An image of". A caption that
    begins with them already is not given them twice, and a generated one is what the model writes behind them."""
    score: Score = "contribution"
    """contribution: activation × ⟨row of W_out, unembedding of the token⟩; gate: the same with the gate alone, as the
    authors' released code; activation; gradient: gradient × activation over the image; gradient-last: at the predicting
    position; effect: what ablating the neuron alone takes from the token's log-odds, an estimate: first order through
    all positions and later layers, and what its own write does to the final norm's scale (a backward pass a noun, as
    the gradients); random: a control."""
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
    nouns: str = "auto"
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
    address: str | None = None
    """Ray cluster to join (auto, or ray://HOST:PORT); default: a local Ray of this process."""
    retry_failed: bool = False
    """Try shards again that an earlier call set aside."""
    local: bool = False
    """Run in this process, without Ray: one worker with all cores."""
    trust_remote_code: bool = False
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

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """The fewest and the most workers, where that was asked for."""
        return worker_range(self.workers)

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that the results depend on; model, data and nouns are known by their digests instead."""
        known = {"model", "data", "nouns"}
        # The data's captions are never cut off.
        unused = {"longest"} if self.captions == "dataset" else set()
        return self.model_dump(exclude=set(EXECUTION) | known | unused)

    def fingerprint(self, **digests: str) -> str:
        """Return a digest of all that the results depend on; the same for every way of doing the work."""
        facts = self.result_settings() | digests
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def census_settings(values: dict[str, Any]) -> CensusSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    try:
        return CensusSettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error


def first_problem(error: ValidationError) -> str:
    """Return the first problem of a validation in one line: which setting, which value, what it should be."""
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown setting {name!r}"
    if problem["type"] == "missing":
        return f"setting {name!r} is missing"
    return f"setting {name} = {problem['input']!r}: {problem['msg'].removeprefix('Value error, ')}"


def unit_of(score: str, *, folded: bool) -> str:
    """Return the unit of a score; empty where it has none."""
    unit = UNITS[score]
    return FOLDED if folded and score in ("contribution", "gate") else unit


def describe(name: str) -> str:
    """Return the documentation of one setting, for the command line's help."""
    return " ".join((CensusSettings.model_fields[name].description or "").split())
