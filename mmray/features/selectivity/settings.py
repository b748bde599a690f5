"""Settings of `mmray selectivity`. Each docstring is also the help of the command line, so it stays short."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from mmray.engine.settings import JobSettings, checked, execution
from mmray.errors import InputError
from mmray.models.options import TEXT_BRANCH
from mmray.objects.answer_scores import BEGINS, answer_score

Method = Literal["lape", "contribution"]
Modules = Literal["language", "vision", "projector", "qformer-text", "all"]
Count = Literal["caption", "image", "all"]
Positions = Literal["answer", "all"]
Values = Literal["course", "mean"]
Steered = Literal["chosen", "switch"]

RATE = 0.01
"""Fraction of all neurons that is chosen, as published."""
BAR = 0.95
"""Quantile of the probabilities of all neurons and labels that a label's neuron must exceed, as published."""

TOGETHER = "all"
"""Value of `module` for all modules of a model, and of their neurons together."""

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
    module: Modules = "language"
    """Module of the neurons; all: those of each module, and tests of all together. qformer-text is the Q-Former's
    branch that reads the question. contribution: language only."""
    count: Count = "caption"
    """Tokens of the language module that count: the caption's, the image's, or all, with those of the prompt. Other
    modules have image tokens only, and qformer-text the question's. contribution: caption only."""
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
    accuracy: list[str] | None = None
    """How answers are scored: begins (default), exact, letter, vqa, anls, or a judge MODULE:FUNCTION. Repeatable;
    LABEL=SCORE is for one label. All but begins write replies."""
    longest: int = Field(16, ge=1)
    """Most tokens of such a reply."""
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
    def modality(self) -> str:
        """The tokens that count, as tables name them: a tower or projector has image tokens only."""
        if self.module in ("language", TOGETHER):
            return "text" if self.count == "caption" else self.count
        return "text" if self.module == TEXT_BRANCH else "image"

    def of(self, module: str) -> SelectivitySettings:
        """Return the settings of the analysis of one module."""
        return self.model_copy(update={"module": module})

    def analysis(self) -> dict[str, str]:
        """Return the columns that distinguish this analysis from others in a table."""
        return {"label_kind": self.by, "method": self.method, "module": self.module, "modality": self.modality}

    def score_of(self, label: str) -> str:
        """Return the name of the score of a label's answers: its own, else the one for all labels."""
        named = {own: score for entry in self.accuracy or () for own, _, score in [entry.rpartition("=")]}
        return named.get(label, named.get("", BEGINS))

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
            "--method contribution: neurons of other modules than the decoder write no tokens; use --method lape"
        )
    if settings.method == "contribution" and settings.count != "caption":
        raise InputError("--method contribution: neurons contribute to tokens of the caption only; leave --count out")
    for entry in settings.accuracy or ():
        answer_score(entry.rpartition("=")[2])
    if settings.steer is not None:
        if not all(settings.steered or ()):
            raise InputError(f"--steer {settings.steer}: write FROM:TO, two labels such as en:es")
        if len(set(settings.steered or ())) < 2:
            raise InputError(f"--steer {settings.steer}: the labels are the same; give two labels such as en:es")
        if settings.module != "language":
            raise InputError("--steer: only neurons of the language decoder can be steered; leave --module out")
    return settings
