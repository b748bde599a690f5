"""Settings of `mmray selectivity`. Each docstring is also the help of the command line, so it stays short."""

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
"""Fraction of all neurons that is chosen, as published."""
BAR = 0.95
"""Quantile of the probabilities of all neurons and labels that a label's neuron must exceed, as published."""

CONTROLS = frozenset({"permutations", "bootstraps"})
"""Settings that affect what is reported about a choice of neurons, but not the choice."""


class SumsSettings(JobSettings):
    """Settings of the pass over samples that the neurons are chosen from."""

    run: str = execution()
    """Folder of a run: a local path or s3://bucket/prefix."""
    by: str = "language"
    """Label of a sample: language, domain, or a column that the census got as --label-column."""
    method: Method = "lape"
    """How a label's neurons are chosen. lape: lowest entropy of the probability to be active (LAPE, or DAPE for
    domains); contribution: highest mean contribution to a label's tokens compared with any other label's."""
    module: Module = "language"
    """Module of the neurons. contribution: language only."""
    modality: Modality = "text"
    """Tokens at which activity is counted. Always image for other modules, and text for contribution."""
    balance: bool = False
    """Select from about the same number of tokens per label."""
    samples: int | None = Field(None, ge=1)
    """Select from the first N samples of the run; default: all."""
    permutations: int = Field(20, ge=0)
    """Times that labels are shuffled, to measure what chance selects."""
    bootstraps: int = Field(20, ge=0)
    """Times that samples are drawn again, to measure stability."""
    held_out: float = Field(0.25, gt=0, lt=1)
    """Fraction of the images held out for tests. The selection does not see them if --interventions, --steer or
    --stages test it. Later calls with the same settings don't see them either."""
    seed: int = 0
    """Seed of all random draws."""
    batch_size: int = execution(32, ge=1)
    """Samples per forward pass."""


class SelectivitySettings(SumsSettings):
    """Settings of `mmray selectivity`: how neurons are chosen from the sums, and how they are tested."""

    rate: float = Field(RATE, gt=0, le=1)
    """Fraction of the neurons that is chosen. Of all by lape, per label by contribution."""
    bar: float = Field(BAR, gt=0, lt=1)
    """Quantile of all probabilities that a label's neuron must exceed. With lape only."""
    interventions: bool = False
    """Zero each label's neurons, and measure held-out texts and answers. Controls: as many random ones per layer."""
    questions: int = Field(1, ge=0)
    """Questions to ask per held-out sample, if the data has any."""
    steer: str | None = None
    """FROM:TO, such as en:es: caption with FROM's neurons off and TO's on. The prompt is FROM's."""
    steer_neurons: Steered = "chosen"
    """Neurons that --steer sets. chosen: FROM's chosen neurons are zeroed and TO's are set; switch: set the neurons
    whose activations separate the two labels best."""
    steer_share: float = Field(0.25, gt=0, le=1)
    """Fraction of all neurons that --steer-neurons switch sets."""
    steer_values: Values = "course"
    """Value that --steer sets. TO's mean at the same token of an answer (course), or over all tokens (mean)."""
    steer_factor: float = Field(2.0, gt=0)
    """Factor that multiplies that mean."""
    steer_positions: Positions = "answer"
    """Positions that --steer sets. From the one that predicts the answer's first token on, or all, image included."""
    stages: bool = False
    """Read every layer by the logit lens. As it is, and with each label's neurons zeroed."""

    @property
    def tests(self) -> bool:
        """Whether anything is measured on held-out samples."""
        return self.interventions or self.stages or self.steer is not None

    @property
    def steered(self) -> tuple[str, str] | None:
        """The label whose prompt is used, and the label to steer to."""
        if self.steer is None:
            return None
        source, _, target = self.steer.partition(":")
        return source, target

    @property
    def counted_modality(self) -> Modality:
        """Modality of the tokens that count: a tower or projector has image tokens only."""
        return self.modality if self.module == "language" else "image"

    def analysis(self) -> dict[str, str]:
        """Return the columns that distinguish this analysis from others in a table."""
        return {"label_kind": self.by, "method": self.method, "module": self.module, "modality": self.counted_modality}

    def sums(self) -> SumsSettings:
        """Return the settings of the pass that the neurons are chosen from."""
        return SumsSettings(**self.model_dump(include=set(SumsSettings.model_fields)))

    def choice(self) -> str:
        """Return a digest of the settings that decide which neurons are chosen, whatever tests they undergo."""
        # Tests are left out on purpose: the same choice must keep the same samples held out.
        own = self.model_dump(include={*SumsSettings.model_fields, "rate", "bar"} - CONTROLS)
        dumped = json.dumps(SelectivitySettings(**own).result_settings(), sort_keys=True)
        return hashlib.sha256(dumped.encode()).hexdigest()[:16]


def selectivity_settings(values: dict[str, Any]) -> SelectivitySettings:
    """Return validated settings. Raises InputError that names the first wrong setting and what it may be."""
    settings = checked(SelectivitySettings, values)
    if settings.method == "contribution" and settings.module != "language":
        raise InputError(
            "--method contribution: neurons of the vision tower and the projector write no tokens; use --method lape"
        )
    if settings.method == "contribution" and settings.modality != "text":
        raise InputError("--method contribution: neurons contribute to tokens of the text only; leave --modality out")
    if settings.steer is not None:
        if not all(settings.steered or ()):
            raise InputError(f"--steer {settings.steer}: write FROM:TO, two labels such as en:es")
        if len(set(settings.steered or ())) < 2:
            raise InputError(f"--steer {settings.steer}: the labels are the same; give two labels such as en:es")
        if settings.module != "language":
            raise InputError("--steer: only neurons of the language decoder can be steered; leave --module out")
    return settings
