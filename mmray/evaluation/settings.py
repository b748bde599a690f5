"""Typed settings of an evaluation, the documentation of each, and the fingerprint that its folder is named by."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.errors import InputError
from mmray.evaluation.answers import Parser
from mmray.evaluation.facts import Adversarial, GroundTruth, Positives
from mmray.settings import LONGEST, Workers, first_problem


class MeasureSettings(BaseModel):
    """What is measured, and how; the samples are given."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_size: int = Field(32, ge=1)
    """Images a forward pass; halved by itself where memory runs out."""
    prompt: str | None = None
    """Question before captions; default: the run's, else "Describe the image in few words." in the caption's
    language."""
    text_questions: str | None = None
    """File with a question without an image a line, a tab and the expected answer behind it; default: questions about
    the data's objects."""
    text_count: int = Field(200, ge=0)
    """Questions without an image that are drawn from those about the data's objects."""
    longest: int = Field(LONGEST, ge=1)
    """Tokens at most in a caption or an answer; a longer one is cut off there. CHAIR is usually given at 64 or 512."""
    ground_truth: GroundTruth | None = None
    """Which objects are in an image, for CHAIR, POPE and hallucination: instances (annotated), captions (named by the
    data's captions), or union (published). Default: union where the data is COCO with both, else instances."""
    synonyms: str | None = None
    """Words that count as an object: coco (a table of COCO's 80 objects, with CHAIR's rules), none, or a file: JSON of
    object → synonyms, or lines as in CHAIR's synonyms.txt. All objects listed are looked for. Default: coco where every
    object of the data is one of COCO's, else none."""
    pope_objects: int = Field(1, ge=0)
    """Present objects of an image that POPE asks for, and as many absent ones a setting (published: 3); 0: no POPE."""
    pope_positives: Positives = "drawn"
    """Which present objects POPE asks for: drawn, from every image; first: an image's first ones, and no image that has
    fewer (as published)."""
    pope_adversarial: Adversarial = "object"
    """POPE's adversarial objects: most often together with the object asked for (as published), or with all objects of
    the image."""
    pope_parser: Parser = "sentences"
    """How POPE reads an answer: sentences (the first sentence that says yes or no, denies or affirms), or released (no
    where the first sentence has No, no or not, else yes)."""
    encoder: str | None = None
    """Folder of a text encoder for BERTScore-style similarity to the data's captions; default: not measured."""
    detector: str | None = None
    """Detector that no edit of neurons reaches, asked whether what captions name is there: on the model's own tower
    (`demo`, or a folder of heads), or an OWL-ViT or OWLv2 (folder or hub id); default: none is."""
    bleu: bool | None = None
    """Measure sacrebleu against the data's captions; default: where sacrebleu is installed."""
    mmedit: str | None = None
    """E-VQA or E-IC JSON of MMEdit, read as it is: its records are asked too."""
    mmedit_images: str | None = None
    """Folder of the images that the records name; default: that of the JSON."""
    draws: int = Field(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""
    seed: int = 0
    """Seed of the bootstrap and of what is drawn from the data."""


class EvaluationSettings(MeasureSettings):
    """Everything that `mmray evaluate` can be told."""

    run: str
    """Folder of the run that the edit was made from."""
    edit: str
    """Folder of the edit."""
    data: str
    """Data to measure on: `demo`, Parquet file, folder or glob, WebDataset tars, image folder with metadata, COCO
    captions JSON, or `hf:NAME[:SPLIT]`; local or s3://."""
    limit: int | None = Field(None, ge=1)
    """Use the first N samples only; all by default."""
    shard_size: int = Field(100, ge=1)
    """Samples a shard: the unit of work, and what a crash costs."""
    workers: Workers = None
    """Actors, each with a model replica: a number, or MIN:MAX to let Ray add and remove some. Default: one a GPU of the
    cluster; without GPUs one a core, at most four a machine."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker; default: 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to join (auto, or ray://HOST:PORT); default: a local Ray of this process."""
    retry_failed: bool = False
    """Try shards again that an earlier call set aside."""
    image_column: str | None = None
    """Column of the image; default: the run's."""
    caption_column: str | None = None
    """Column of the caption; default: the run's."""
    id_column: str | None = None
    """Column of the sample id; default: the run's."""
    language_column: str | None = None
    """Column of the caption's language; default: the run's."""
    objects_column: str | None = None
    """Column with the list of objects in the image; default: the run's."""

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that the result depends on; what they name is known by its digests instead."""
        return self.model_dump(exclude=EXECUTION | NAMED)

    def fingerprint(self, digests: dict[str, str]) -> str:
        """Return a digest of all that the result depends on; the same for every way of doing the work."""
        facts = self.result_settings() | {"digests": digests}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


EXECUTION = {"batch_size", "draws", "workers", "gpus_per_worker", "address", "retry_failed"}
"""Settings that say how the work is done, or come after it."""
NAMED = {"run", "edit", "data", "synonyms", "encoder", "detector", "mmedit", "mmedit_images", "text_questions"}
"""Settings that name files and folders."""


def evaluation_settings(values: dict[str, Any]) -> EvaluationSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    try:
        return EvaluationSettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error


def measure_settings(**values: Any) -> MeasureSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    try:
        return MeasureSettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
