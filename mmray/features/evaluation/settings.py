"""Settings of an evaluation, with the documentation of each."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest
from mmray.models.decodings import decoding_of
from mmray.models.options import LONGEST
from mmray.objects.answers import Parser
from mmray.objects.statistics import Adversarial, GroundTruth, Positives


class MeasureSettings(BaseModel):
    """What to measure, and how, on given samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_size: int = execution(32, ge=1)
    """Images per forward pass. Halved automatically if memory runs out."""
    prompt: str | None = None
    """Question before captions; default: the run's. If it has none, "Describe the image in few words." in the caption's
    language."""
    text_questions: str | None = known_by_digest(None)
    """File of text-only questions; default: about the data's objects. One per line, with a tab and the expected
    answer after it."""
    text_count: int = Field(200, ge=0)
    """Text-only questions to draw from those about objects. Of the general prompts and plain texts that mmray
    ships, at most as many each."""
    longest: int = Field(LONGEST, ge=1)
    """Most tokens in a caption or an answer. Longer ones are cut off. CHAIR is usually reported at 64 or 512."""
    ground_truth: GroundTruth | None = None
    """Source of an image's objects. instances: annotated; captions: named by the data's captions; union: both, as
    published. Default: union if the data has both, else instances. It has both if it has objects and lists each image's
    captions (COCO, a column of lists). Used by CHAIR, POPE and hallucination. Captions in several rows are matched by
    their image, which is read an extra time."""
    synonyms: str | None = known_by_digest(None)
    """Words that count as an object: coco, none, or a file. coco: a table of COCO's 80 objects, with CHAIR's rules;
    file: JSON of object → synonyms, or lines as in CHAIR's synonyms.txt. All objects listed are searched for. Default:
    coco if every object of the data is one of COCO's, else none."""
    pope_objects: int = Field(1, ge=0)
    """Present objects per image that POPE asks about; 0: no POPE. As many absent ones per strategy; published: 3."""
    pope_positives: Positives = "drawn"
    """Which present objects POPE asks about. drawn: random ones of every image; first: an image's first ones, only of
    images with enough, as published."""
    pope_adversarial: Adversarial = "object"
    """What POPE's adversarial objects co-occur with. object: the one asked about, as published; image: all of the
    image."""
    pope_parser: Parser = "sentences"
    """How POPE reads an answer. sentences: by the first sentence that says yes or no, denies or affirms; released: no
    where the first sentence has No, no or not, else yes."""
    pope: list[str] | None = known_by_digest(None)
    """File of POPE's released questions; may be given again. JSON lines with image, text and label. A file's
    name says how absent objects were chosen: random, popular or adversarial. POPE is then measured on these questions
    alone."""
    pope_images: str | None = known_by_digest(None)
    """Folder of their images; default: the first file's own."""
    encoder: str | None = known_by_digest(None)
    """Folder of a text encoder for BERTScore-style similarity. To the data's captions; without it, not measured."""
    detector: str | None = known_by_digest(None)
    """Detector to check that named objects are there; default: none. No edit of neurons changes it. On the
    model's own tower: `demo`, or a folder of heads; or an OWL-ViT or OWLv2, a folder or hub id."""
    bleu: bool | None = None
    """Measure sacrebleu; default: if sacrebleu is installed. Against the data's captions."""
    mmedit: str | None = known_by_digest(None)
    """E-VQA or E-IC JSON of MMEdit to measure on as well."""
    mmedit_images: str | None = known_by_digest(None)
    """Folder of the images that records name; default: the JSON's own."""
    draws: int = after_work(1000, ge=1)
    """Bootstrap draws over images, for the intervals."""
    seed: int = 0
    """Seed of the bootstrap and of every other draw."""


class EvaluationSettings(JobSettings, MeasureSettings):
    """The options of `mmray evaluate`."""

    run: str = known_by_digest()
    """Folder of the run that the edit was made from."""
    edit: str | None = known_by_digest(None)
    """Folder of the edit."""
    decoding: str | None = known_by_digest(None)
    """A decoding: vcd, no-image, pai, average, or NAME:STRENGTH. It takes the place of --edit; replies about images are
    measured."""
    data: str = known_by_digest()
    """Data to measure on, in any form that a census takes."""
    limit: int | None = Field(None, ge=1)
    """Use the first N samples only; default: all."""
    shard_size: int = Field(100, ge=1)
    """Samples per shard. A shard is the unit of work, and what a crash costs."""
    image_column: str | None = None
    """Column of the image; default: the run's."""
    caption_column: str | None = None
    """Column of the caption; default: the run's."""
    id_column: str | None = None
    """Column of the sample id; default: the run's."""
    language_column: str | None = None
    """Column of the caption's language; default: the run's."""
    objects_column: str | None = None
    """Column of the objects in the image; default: the run's."""

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.edit is None) == (self.decoding is None):
            raise ValueError("give --edit or --decoding, and not both")
        if self.decoding is not None:
            decoding_of(self.decoding)
            if self.pope or self.mmedit:
                raise ValueError("--pope and --mmedit are measured of edits; leave them out with --decoding")
        return self

    @property
    def subject(self) -> str:
        """Folder of what is measured, where the results are written."""
        if self.edit is not None:
            return self.edit.rstrip("/")
        return f"{self.run.rstrip('/')}/decodings/{str(decoding_of(self.decoding or '')).replace(':', '-')}"


def evaluation_settings(values: dict[str, Any]) -> EvaluationSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(EvaluationSettings, values)


def measure_settings(**values: Any) -> MeasureSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(MeasureSettings, values)
