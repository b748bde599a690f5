"""Settings of an edit, with the documentation of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmray.engine.settings import checked
from mmray.features.editing.edit_methods import EDIT_METHODS, Method, methods_help

By = Literal["specific", "score", "share", "probe"]


class EditSettings(BaseModel):
    """What an edit is for, and how it is made: the options of `mmray edit`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str | None = None
    """Concept to replace in what the model says; needs --target. Default: no swap."""
    target: str | None = None
    """Word to say instead of the source; needs --source. Default: no swap."""
    suppress: str | None = None
    """Word to remove from what the model says, instead of a swap. Default: none."""
    reduce_hallucination: bool = False
    """Find objects that the model names and that are not there, in its own captions of up to 1,024 of the run's images,
    and unlearn them, instead of a swap. Off by default."""
    replacement: str = "object"
    """Neutral word that replaces a suppressed one."""
    method: Method = Field("learned", description=methods_help())
    neurons: int | None = Field(None, ge=1)
    """Most located neurons to edit, in one try. Default: 50 for a swap, which must also write the target, else 30; if a
    bound is then broken, more of them, and then idle neurons that are patched. A patch takes one neuron per token: with
    --method patch, any number makes one try."""
    layers: int = Field(1, ge=1)
    """Number of last layers whose neurons may be edited. With 1, learning runs no block of the network."""
    by: By = "specific"
    """Order of the ranking that locates the neurons. probe, with --reduce-hallucination: those that mmray hallucination
    --neurons found, in the last --layers."""
    samples: int = Field(24, ge=1)
    """Most images of the source, or of each hallucinated word, to make the edit on."""
    kept: int | None = Field(None, ge=0)
    """Images of other concepts whose captions must stay as they are. Default: 256; 512 for a swap of a model of at most
    30 million parameters, for which writing them takes little time."""
    keep_text: str | None = None
    """JSON file with the lists prompts and texts: text-only prompts whose replies must stay, and texts whose
    probabilities must. Default: a general set in several languages."""
    caption_weight: float = Field(1.0, ge=0)
    """Weight of the captions that must stay."""
    answer_weight: float = Field(1.0, ge=0)
    """Weight of the answers about these images that must stay."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of the text-only replies and the texts that must stay."""
    steps: int = Field(20, ge=1)
    """Steps of gradient descent (L-BFGS) per round."""
    factor: float = 0.0
    """With --method scale: factor for the neurons' rows."""
    sigma: float = Field(0.1, ge=0)
    """With --method noise: standard deviation of the noise on each number of the rows."""
    language: str = "en"
    """Language of the captions to edit."""
    prompt: str | None = None
    """Question before the caption; default: as in the census."""
    seed: int = 0
    """Seed of every random draw."""

    @model_validator(mode="after")
    def _one_task(self) -> EditSettings:
        swap = self.source is not None or self.target is not None
        if swap + (self.suppress is not None) + self.reduce_hallucination != 1:
            raise ValueError("give --source and --target, or --suppress, or --reduce-hallucination")
        if swap and (self.source is None or self.target is None):
            raise ValueError("--source and --target go together")
        if self.concept and self.concept == self.new_word.casefold():
            names = "--source and --target" if swap else "--suppress and --replacement"
            raise ValueError(f"{names} are the same word; give another one")
        if self.by == "probe" and not self.reduce_hallucination:
            raise ValueError("--by probe is for --reduce-hallucination")
        if swap and EDIT_METHODS[self.method].closed_form:
            raise ValueError(
                f"--method {self.method} can't write --target; give --suppress {self.source}, or another method"
            )
        return self

    @property
    def concept(self) -> str:
        """The concept to remove, in lower case."""
        return (self.source or self.suppress or "").casefold()

    @property
    def new_word(self) -> str:
        """The word to say instead of the concept."""
        return self.target or self.replacement

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each kind of answers that must stay."""
        text = self.text_weight
        # Replies stand for all that the model says without an image, in answer to any prompt.
        return {"captions": self.caption_weight, "answers": self.answer_weight, "replies": 5 * text, "texts": text}

    @property
    def searches(self) -> bool:
        """Whether other edits are tried while one breaks a bound."""
        return self.method in ("learned", "patch") and self.neurons is None and not self.reduce_hallucination

    @property
    def neuron_limit(self) -> int:
        """The most neurons to edit, in the first try."""
        return self.neurons or (50 if self.source else 30)


def edit_settings(values: dict[str, Any]) -> EditSettings:
    """Return checked settings; raises InputError naming the first that is wrong and what is allowed."""
    return checked(EditSettings, values)
