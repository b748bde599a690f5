"""Settings of `mmray selectivity`, and the documentation of each."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from mmray.engine.settings import JobSettings, checked, execution
from mmray.errors import InputError
from mmray.models.options import Module

Method = Literal["lape", "contribution"]
Modality = Literal["text", "image", "both"]
Positions = Literal["answer", "all"]
Values = Literal["course", "mean"]
Steered = Literal["chosen", "switch"]

RATE = 0.01
"""Part of all neurons that is chosen, as published."""
BAR = 0.95
"""Quantile, over the probabilities of all neurons and labels, that a label's own neuron has to exceed, as published."""

CONTROLS = frozenset({"permutations", "bootstraps"})
"""Settings that change what is said about a choice of neurons, and not the choice."""


class SumsSettings(JobSettings):
    """What the pass over samples depends on that neurons are chosen from."""

    run: str = execution()
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
    seed: int = 0
    """Of the draws."""
    batch_size: int = execution(32, ge=1)
    """Samples per forward pass."""


class SelectivitySettings(SumsSettings):
    """Everything that `mmray selectivity` can be told: how neurons are chosen from the sums, and how they are tested.

    Test results depend on all of it.
    """

    rate: float = Field(RATE, gt=0, le=1)
    """Part of the neurons that is chosen: by lape in all, as published; by contribution for each label."""
    bar: float = Field(BAR, gt=0, lt=1)
    """Quantile of all probabilities that a neuron must exceed under a label to be its own (lape)."""
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

    @property
    def tests(self) -> bool:
        """Whether something is measured on held-out samples."""
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

    def sums(self) -> SumsSettings:
        """Return the settings of the pass that neurons are chosen from."""
        return SumsSettings(**self.model_dump(include=set(SumsSettings.model_fields)))

    def choice(self) -> str:
        """Return a digest of what decides which neurons are chosen; the same whatever they are tested by."""
        own = self.model_dump(include={*SumsSettings.model_fields, "rate", "bar"} - CONTROLS)
        facts = json.dumps(SelectivitySettings(**own).result_settings(), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def selectivity_settings(values: dict[str, Any]) -> SelectivitySettings:
    """Return checked settings; raises InputError naming the first that is wrong and what is allowed."""
    settings = checked(SelectivitySettings, values)
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
