"""Typed settings of an edit, with the documentation of each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmray.engine.settings import first_problem
from mmray.errors import InputError

Method = Literal["learned", "zero", "scale", "project", "noise", "random", "activation", "last-mlp", "rank-one", "lora"]
WITHOUT_TARGET = ("zero", "scale", "project", "noise")
"""Methods that only take away what neurons write: they can't have another word said."""
By = Literal["specific", "score", "share"]


class EditSettings(BaseModel):
    """Everything that `mmray edit` can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: str | None = None
    """Concept that the model is to name no more; by default none is swapped."""
    target: str | None = None
    """What it is to say instead of the source; goes with --source, by default none."""
    suppress: str | None = None
    """Word that is to vanish: instead of a swap; by default none."""
    reduce_hallucination: bool = False
    """Find what the model claims and is not there, in its own captions of the run's samples, and unlearn it: instead of
    a swap; off by default."""
    replacement: str = "object"
    """Neutral word that takes the place of a suppressed one."""
    method: Method = "learned"
    """learned: deltas of the located neurons; zero, scale, project: closed forms to suppress; noise: the published
    perturbation; controls and baselines: random and activation (the same objective on other neurons), last-mlp (FT-L),
    rank-one (as ROME, one layer), lora (needs peft)."""
    neurons: int | None = Field(None, ge=1)
    """Most neurons that are edited; default: 50 for a swap, which has to have the target said, and 30 else."""
    layers: int = Field(1, ge=1)
    """Last layers whose neurons may be edited. An edit of the last layer alone is learnt without running any block."""
    by: By = "specific"
    """Order of the ranking that locates them."""
    samples: int = Field(24, ge=1)
    """Most images of the source, or of a hallucinated word, that the edit is made on."""
    kept: int = Field(384, ge=0)
    """Images of other concepts, whose captions are to stay as they are."""
    steps: int = Field(60, ge=1)
    """Steps of gradient descent."""
    factor: float = 0.0
    """With --method scale: what the neurons' rows are multiplied by."""
    sigma: float = Field(0.1, ge=0)
    """With --method noise: standard deviation of what is added to each number of the rows."""
    language: str = "en"
    """Language of the captions that are edited."""
    prompt: str | None = None
    """Question before the caption; default: as in the census."""
    seed: int = 0
    """Seed of every draw."""

    @model_validator(mode="after")
    def _one_task(self) -> EditSettings:
        swap = self.source is not None or self.target is not None
        if swap + (self.suppress is not None) + self.reduce_hallucination != 1:
            raise ValueError("give --source and --target, or --suppress, or --reduce-hallucination")
        if swap and (self.source is None or self.target is None):
            raise ValueError("--source and --target go together")
        if swap and self.source == self.target:
            raise ValueError("--source and --target are the same")
        if swap and self.method in WITHOUT_TARGET:
            raise ValueError(
                f"--method {self.method} can't have --target said; give --suppress {self.source}, or another method"
            )
        return self

    @property
    def concept(self) -> str:
        """The concept that is to vanish, in lower case."""
        return (self.source or self.suppress or "").casefold()

    @property
    def most(self) -> int:
        """The most neurons that are edited."""
        return self.neurons or (50 if self.source else 30)

    @property
    def instead(self) -> str:
        """What is to be said instead."""
        return self.target or self.replacement


def edit_settings(values: dict[str, Any]) -> EditSettings:
    """Return checked settings; raises InputError naming the first that is wrong and what is allowed."""
    try:
        return EditSettings(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(
            problem["msg"].removeprefix("Value error, ") if not problem["loc"] else first_problem(error)
        ) from error
