"""Settings of `mmray hallucination` and `mmray perturb`, each with its documentation."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest
from mmray.errors import InputError
from mmray.models.options import LONGEST
from mmray.objects.answers import reader
from mmray.objects.statistics import GroundTruth

TWO_UNRELATED = "--unrelated: give it twice, such as --unrelated cup --unrelated pan"


class DetectorSettings(JobSettings):
    """Settings of both: the detector next to the model, and how the data is cut."""

    detector: str | None = known_by_digest(None)
    """Detector on the model's own tower: `demo`, or a folder of heads; or an OWL-ViT or OWLv2 checkpoint, with
    --alignment. Default: `demo` for the demo model; for others there is none."""
    alignment: str | None = known_by_digest(None)
    """Folder of the network that `mmray align` made for the detector's tower and the model."""
    limit: int | None = Field(None, ge=1)
    """Use the first N samples only; all by default."""
    shard_size: int = Field(24, ge=1)
    """Samples per shard: the unit of work, and the most that a crash costs."""
    batch_size: int = execution(24, ge=1)
    """Replies generated at once."""
    seed: int = 0
    """Seed of everything drawn."""
    draws: int = after_work(1000, ge=1)
    """Bootstrap draws over images, for intervals."""


class ClaimSettings(DetectorSettings):
    """Whose captions are read, and what counts as being in an image."""

    run: str = execution()
    """Folder of the run whose model is asked, and where the tables are written."""
    data: str | None = known_by_digest(None)
    """Data with objects to ask about, as for a census; default: the run's own."""
    longest: int = Field(LONGEST, ge=1)
    """Maximum tokens of a caption; a longer one is cut off there."""
    ground_truth: GroundTruth | None = known_by_digest(None)
    """Source of an image's objects. instances: annotated; captions: named by the data's captions; union: both. Default:
    union if the data has both, else instances. It has both if it has objects and lists each image's captions (COCO, a
    column of lists). Captions in several rows are matched by their image, so every image is read once more."""
    synonyms: str | None = known_by_digest(None)
    """Words that count as an object in captions: coco, none, or a file. coco: a table of COCO's 80 objects, with
    CHAIR's rules; file: JSON of object → synonyms, or lines as in CHAIR's synonyms.txt. Every listed object counts,
    whether the data has it or not. Default: coco where every object of the data is one of COCO's, else none."""


class HallucinationSettings(ClaimSettings):
    """All settings of `mmray hallucination`."""

    questions: int = Field(1, ge=0)
    """Present objects per image to ask about, and as many absent ones of each kind (random, popular, adversarial); 0:
    captions only."""
    pope: list[str] | None = known_by_digest(None)
    """POPE's released questions to ask instead: JSON lines of image, text, label. May be given more than once; only
    images of the data that they name, by file or COCO number, are looked at."""


class ProbeSettings(ClaimSettings):
    """Settings of the pass that reads candidate neurons, and of the probe that is fitted to them."""

    shard_size: int = Field(128, ge=1)
    """Samples per shard: the unit of work, and the most that a crash costs. Default: 24; with --neurons 128."""
    candidates: int = known_by_digest(2048, ge=1)
    """With --neurons: neurons of the largest effect that the probe chooses from."""
    most: float = after_work(0.005, gt=0, le=1)
    """With --neurons: largest share of all neurons that the probe may use."""


class DoseSettings(ClaimSettings):
    """Settings of the interventions on the probe's neurons."""

    questions: int = Field(1, ge=0)
    """Present objects per image to ask about, and as many absent ones of each kind (random, popular, adversarial); 0:
    captions only."""
    doses: list[float] = known_by_digest([0.0, 0.5, 2.0, 3.0], min_length=1)
    """With --interventions: factors of the neurons' activations. May be given more than once."""
    decoding: list[str] = known_by_digest([])
    """With --interventions: decoding to compare with: vcd, no-image, pai, average, or NAME:STRENGTH. May be given more
    than once."""
    ban_below: list[str] = known_by_digest([])
    """With --interventions: write captions again without objects of less than this probability: P, or P:DECODING to
    write and judge them by a decoding, such as 0.3:average. May be given more than once."""
    tested: int = known_by_digest(400, ge=1)
    """With --interventions: most test images that are captioned under each of them."""


# ProbeSettings first: where several bases have a setting, such as shard_size, the first one's default counts.
class NeuronSettings(ProbeSettings, DoseSettings, HallucinationSettings):
    """All settings of `mmray hallucination --neurons`."""

    interventions: bool = False
    """With --neurons: scale the probe's neurons, and as many random ones of the same layers, while captions are
    written. Off by default."""

    def probe(self) -> ProbeSettings:
        """Return the settings of the first two passes, and of the probe."""
        return ProbeSettings(**self.model_dump(include=set(ProbeSettings.model_fields)))

    def claims(self) -> ClaimSettings:
        """Return the settings of the first pass."""
        return ClaimSettings(**self.model_dump(include=set(ClaimSettings.model_fields)))

    def dose(self) -> DoseSettings:
        """Return the settings of the interventions."""
        return DoseSettings(**self.model_dump(include=set(DoseSettings.model_fields)))


class MoveSettings(DetectorSettings):
    """How embeddings are moved, and what is asked about them."""

    unrelated: list[str] | None = None
    """Concept unrelated to the question, for a control that moves by the same norm; give it twice. Default: two other
    objects of the data."""
    question: list[str] | None = None
    """Question to ask as it is after each move; may be given more than once. Default: whether source, target, and an
    object of the data that no move is about are in the image."""
    parse: str = "yes_no"
    """How an answer is read from a reply: yes_no, number, or two words such as man|woman. Replies without an answer, or
    with several different numbers, are counted as unparsable and left out."""
    norm: float = Field(0.85, gt=0)
    """Bound of the move's L2 norm, as a fraction of the embedding's own. Really replacing an object takes 0.63 in the
    demo's scenes; answers change more reliably a third beyond that."""
    steps: int = Field(20, ge=2)
    """Gradient steps of a move; a move in one step is measured too."""
    randoms: int = Field(1, ge=1)
    """Random moves of the same norm to compare with, of each kind."""
    sign_step: float | None = Field(None, gt=0)
    """Take the published step too, with controls of its norm. By this much, every entry of the embedding, CLS included,
    moves along the sign of the gradient; published: 1. Default: not taken."""


class PerturbationSettings(MoveSettings):
    """All settings of `mmray perturb`."""

    model: str = known_by_digest()
    """Hugging Face checkpoint folder, hub id, or `demo`."""
    data: str = known_by_digest()
    """Images to ask about: `demo`, Parquet, WebDataset tars, image folder, COCO, or `hf:NAME[:SPLIT]`; local or
    s3://. Objects are needed only without --source or --target."""
    out: str = execution()
    """Folder of the results: a local path or s3://bucket/prefix."""
    source: str | None = None
    """Concept to move away from, such as man; default: an object of each image."""
    target: str | None = None
    """Concept to move towards, such as woman; default: an object of the data that the image lacks."""


class BiasSettings(MoveSettings):
    """All settings of `mmray bias`."""

    run: str = execution()
    """Folder of the run whose model is asked, and where the tables are written."""
    data: str | None = known_by_digest(None)
    """Portraits, or other images, as for a census; default: the run's own data."""
    pair: list[str] = Field(min_length=1)
    """Prompts to move between, SOURCE:TARGET, such as woman:man; may be given more than once. A pair is for the images
    that have SOURCE among their objects; without objects in the data, for all."""
    question: list[str] = Field(min_length=1)
    """Question to ask before and after each move; may be given more than once."""
    unrelated: list[str] = Field(min_length=1)
    """Concept unrelated to the questions, for a control that moves by the same norm; give it twice."""
    parse: str = "number"
    """How an answer is read from a reply: number, yes_no, or two words such as man|woman. Replies without an answer, or
    with several different numbers, are counted as unparsable and left out."""
    sign_step: float | None = Field(1.0, gt=0)
    """The published step, taken next to the bounded move, with controls of its norm. By this much, every entry of the
    embedding, CLS included, moves along the sign of the gradient."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Source and target of each pair."""
        return [(source.strip(), target.strip()) for source, _, target in (one.partition(":") for one in self.pair)]


def hallucination_settings(values: dict[str, Any]) -> HallucinationSettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    return checked(HallucinationSettings, values)


def neuron_settings(values: dict[str, Any]) -> NeuronSettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    return checked(NeuronSettings, values)


def perturbation_settings(values: dict[str, Any]) -> PerturbationSettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    settings = checked(PerturbationSettings, values)
    reader(settings.parse)
    if settings.unrelated is not None and len(settings.unrelated) != 2:
        raise InputError(TWO_UNRELATED)
    if settings.question and not (settings.source and settings.target):
        raise InputError("--question needs --source and --target: what to move away from, and towards")
    return settings


def bias_settings(values: dict[str, Any]) -> BiasSettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    settings = checked(BiasSettings, values)
    reader(settings.parse)
    if len(settings.unrelated) != 2:
        raise InputError(TWO_UNRELATED)
    for one, pair in zip(settings.pair, settings.pairs, strict=True):
        if not all(pair) or ":" in pair[1]:
            raise InputError(f"setting pair = {one!r}: give SOURCE:TARGET, such as woman:man")
    return settings
