"""Settings of `mmray selectivity`, and the documentation of each."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmray.errors import InputError
from mmray.settings import Module, Workers, first_problem

Method = Literal["lape", "contribution"]
Modality = Literal["text", "image", "both"]
Positions = Literal["answer", "all"]
Values = Literal["course", "mean"]
Steered = Literal["chosen", "switch"]

RATE = 0.01
"""Part of all neurons that is chosen, as published."""
BAR = 0.95
"""Quantile, over the probabilities of all neurons and labels, that a label's own neuron has to exceed, as published."""

EXECUTION = frozenset({"run", "batch_size", "workers", "gpus_per_worker", "address", "retry_failed"})


class SelectivitySettings(BaseModel):
    """Everything that `mmray selectivity` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: str
    """Folder of a run: a local path or s3://bucket/prefix."""
    by: str = "language"
    """What labels a sample: language, domain, or a column that the census was told of by --label-column."""
    method: Method = "lape"
    """lape: lowest entropy of the probability to be active, as published for languages and (DAPE) domains;
    contribution: highest mean contribution to a label's tokens over that to any other label's."""
    module: Module = "language"
    """Neurons of the language decoder, the vision tower or the projector; contributions are of the language decoder."""
    modality: Modality = "text"
    """Tokens that activity is counted at; of the vision tower and the projector always those of the image, and
    contributions are to those of the text."""
    rate: float = Field(RATE, gt=0, le=1)
    """Part of the neurons that is chosen: by lape in all, as published; by contribution for each label."""
    bar: float = Field(BAR, gt=0, lt=1)
    """Quantile of all probabilities that a neuron must exceed under a label to be its own (lape)."""
    balance: bool = False
    """Take as many samples of each label as give it about as many tokens as the label with the fewest has."""
    samples: int | None = Field(None, ge=1)
    """Select from the first N samples of the run; by default from all."""
    permutations: int = Field(20, ge=0)
    """Times that labels are shuffled over the samples, to tell what chance selects."""
    bootstraps: int = Field(20, ge=0)
    """Times that samples are drawn again, to tell how stable the selection is."""
    held_out: float = Field(0.25, gt=0, lt=1)
    """Part of the images that the selection does not see where --interventions, --steer or --stages need some; it
    does not see them later either, when neurons are chosen with the same settings and nothing is tested."""
    interventions: bool = False
    """Zero each label's neurons, and as many random ones of each layer, and measure every label's held-out texts and
    answers."""
    questions: int = Field(1, ge=0)
    """Questions of each held-out sample that are asked, where the data has some."""
    steer: str | None = None
    """FROM:TO, such as en:es: ask for captions in the one label's prompt, with its neurons off and the other's on."""
    steer_neurons: Steered = "chosen"
    """chosen: those that the method chose, the one label's zeroed and the other's set; switch: the neurons whose
    activations tell the two labels apart best, all set."""
    steer_share: float = Field(0.25, gt=0, le=1)
    """Part of all neurons that are switches."""
    steer_values: Values = "course"
    """What they are set to: the other label's mean at that token of an answer (course), or over all tokens (mean)."""
    steer_factor: float = Field(2.0, gt=0)
    """What that mean is multiplied by."""
    steer_positions: Positions = "answer"
    """Where: from the position that writes the first token of the answer on, or at all positions, the image's too."""
    stages: bool = False
    """Read every layer by the logit lens at image and text positions, as it is and with each label's neurons zeroed."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = Field(32, ge=1)
    """Samples a forward pass."""
    workers: Workers = None
    """Actors, each with a model replica: a number, or MIN:MAX; by default as for a census."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a worker; by default as for a census."""
    address: str | None = None
    """Ray cluster to join (auto, or ray://HOST:PORT); default: a local Ray of this process."""
    retry_failed: bool = False
    """Try shards again that an earlier call set aside."""

    @property
    def tests(self) -> bool:
        """Tell whether something is measured on held-out samples."""
        return self.interventions or self.stages or self.steer is not None

    @property
    def steered(self) -> tuple[str, str] | None:
        """The label whose prompt is used and the label that is steered to."""
        if self.steer is None:
            return None
        source, _, target = self.steer.partition(":")
        return source, target

    @property
    def looked_at(self) -> Modality:
        """The tokens that count."""
        return self.modality if self.module == "language" else "image"

    def facts(self) -> dict[str, str]:
        """Return what tells this analysis from others in a table."""
        return {"label_kind": self.by, "method": self.method, "module": self.module, "modality": self.looked_at}

    def fingerprint(self, **digests: str) -> str:
        """Return a digest of all that the results depend on."""
        facts = self.model_dump(exclude=set(EXECUTION)) | digests
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def selectivity_settings(values: dict[str, Any]) -> SelectivitySettings:
    """Return checked settings; raises InputError naming the first that is wrong and what is allowed."""
    try:
        settings = SelectivitySettings(**values)
    except ValidationError as error:
        raise InputError(first_problem(error)) from error
    if settings.method == "contribution" and settings.module != "language":
        raise InputError("--method contribution: the vision tower and the projector write no token; use --method lape")
    if settings.method == "contribution" and settings.modality != "text":
        raise InputError(
            "--method contribution: it is the text's tokens that neurons contribute to; leave --modality out"
        )
    if settings.steer is not None:
        if not all(settings.steered or ()):
            raise InputError(f"--steer {settings.steer}: write FROM:TO, two labels such as en:es")
        if len(set(settings.steered or ())) < 2:
            raise InputError(f"--steer {settings.steer}: there is nothing to steer; give two labels such as en:es")
        if settings.module != "language":
            raise InputError("--steer: neurons of the language decoder are steered; leave --module out")
    return settings
