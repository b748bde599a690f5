"""Typed settings of second opinions and of moved embeddings, and the documentation of each."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest
from mmray.errors import InputError
from mmray.models.options import LONGEST
from mmray.objects.answers import reader
from mmray.objects.statistics import GroundTruth


class SightSettings(JobSettings):
    """What both are told: the detector next to the model, and how the data is cut."""

    detector: str = known_by_digest("demo")
    """Detector on the model's own tower: `demo`, or a folder of heads; or an OWL-ViT or OWLv2 checkpoint, with
    --alignment."""
    alignment: str | None = known_by_digest(None)
    """Folder of the network that `mmray align` made for the detector's tower and the model."""
    limit: int | None = Field(None, ge=1)
    """Use the first N samples only; all by default."""
    shard_size: int = Field(24, ge=1)
    """Samples a shard: the unit of work, and what a crash costs."""
    batch_size: int = execution(24, ge=1)
    """Replies that are written at once."""
    seed: int = 0
    """Seed of all that is drawn."""
    draws: int = after_work(1000, ge=1)
    """Draws of the bootstrap over images that intervals are made of."""


class OpinionSettings(SightSettings):
    """Everything that `mmray hallucination` can be told."""

    run: str = execution()
    """Folder of the run whose model is asked, and in whose tables the claims are written."""
    data: str | None = known_by_digest(None)
    """Data with objects to ask about, as for a census; default: the run's own."""
    questions: int = Field(1, ge=0)
    """Present objects of an image that are asked for, and as many absent ones of each kind (random, popular,
    adversarial); 0: captions alone."""
    longest: int = Field(LONGEST, ge=1)
    """Tokens at most in a caption; a longer one is cut off there."""
    ground_truth: GroundTruth | None = known_by_digest(None)
    """Which objects are in an image: instances (annotated), captions (named by the data's captions), or union. Default:
    union where the data has objects and lists each image's captions (COCO, a column of lists), else instances. Captions
    in several rows are matched by their image, which is read once more for it."""
    synonyms: str | None = known_by_digest(None)
    """Words that count as an object in captions: coco (a table of COCO's 80 objects, with CHAIR's rules), none, or a
    file: JSON of object → synonyms, or lines as in CHAIR's synonyms.txt. All objects listed are looked for. Default:
    coco where every object of the data is one of COCO's, else none."""


class PerturbationSettings(SightSettings):
    """Everything that `mmray perturb` can be told."""

    model: str = known_by_digest()
    """Hugging Face checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """Images to ask about: `demo`, Parquet, WebDataset tars, image folder, COCO, or `hf:NAME[:SPLIT]`; local or
    s3://. Captions and objects are only needed where no --source or no --target is given."""
    out: str = execution()
    """Folder of the rows and tables: a local path or s3://bucket/prefix."""
    source: str | None = None
    """What the detector sees and is to see no more, such as a man; default: an object of each image."""
    target: str | None = None
    """What it is to see instead, such as a woman; default: an object of the data that the image lacks."""
    unrelated: list[str] | None = None
    """Two things that have nothing to do with the question, between which a control of equal norm moves; default: two
    other objects of the data."""
    question: list[str] | None = None
    """Question that is asked as it is, once for each move; may be given more than once. Default: whether source, target
    and an object of the data that none of the moves is about are in the image."""
    parse: str = "yes_no"
    """How an answer is read from a reply: yes_no, number, or two words such as man|woman. What can't be read (no
    number, or different ones that are no scale) is counted and left out."""
    norm: float = Field(0.85, gt=0)
    """Bound of the move's L2 norm, in parts of the embedding's own. Exchanging an object really takes 0.62 in the
    demo's scenes; what goes a third further is answered more surely."""
    steps: int = Field(20, ge=2)
    """Gradient steps of the long way; one step is measured too."""
    randoms: int = Field(1, ge=1)
    """Random directions of the same norm, of each of three kinds, that every move is held against."""


def opinion_settings(values: dict[str, Any]) -> OpinionSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(OpinionSettings, values)


def perturbation_settings(values: dict[str, Any]) -> PerturbationSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    settings = checked(PerturbationSettings, values)
    reader(settings.parse)
    if settings.unrelated is not None and len(settings.unrelated) != 2:
        raise InputError(f"setting unrelated = {settings.unrelated!r}: give two things, between which a control moves")
    if settings.question and not (settings.source and settings.target):
        raise InputError("a question of your own needs source and target: what is seen, and is to be seen instead")
    return settings
