"""Settings of `mmray mmedit`, each with its documentation."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from mmray.engine.settings import JobSettings, after_work, checked, execution, known_by_digest
from mmray.features.mmedit.editors import DEFAULT, EDITORS


class MmeditSettings(JobSettings):
    """All settings of `mmray mmedit RUN`."""

    run: str = execution()
    """Folder of the run whose images show what an edit must leave alone."""
    vqa: str | None = known_by_digest(None)
    """Records of E-VQA, or of VLKEB: a JSON file such as vqa_eval.json."""
    captioning: str | None = known_by_digest(None)
    """Records of E-IC: a JSON file such as caption_eval_edit.json."""
    images: str | None = known_by_digest(None)
    """Folder of the images that records name; default: the folder of their file."""
    limit: int | None = Field(None, ge=1)
    """Records of each file, the first ones; default: all."""
    methods: str = Field(",".join(DEFAULT), description=f"Methods, comma-separated, of {', '.join(EDITORS)}.")
    sequential: int | None = Field(None, ge=1)
    """Let edits stay, and measure all records edited so far after every so many; default: each edit is undone."""
    neurons: int | None = Field(None, ge=1)
    """Most neurons to edit, for methods that choose some; default: as `mmray edit`."""
    kept: int = Field(256, ge=0)
    """Images of the run whose captions must stay."""
    keep_text: str | None = None
    """JSON file of texts that must stay, as for `mmray edit`; default: a general set."""
    steps: int = Field(20, ge=1)
    """Steps of gradient descent (L-BFGS) per round, for edits of neurons."""
    batch_size: int = execution(32, ge=1)
    """Images per forward pass when edits are measured."""
    draws: int = after_work(1000, ge=1)
    """Bootstrap draws over images, for the intervals."""
    seed: int = 0
    """Seed of every random draw."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: str) -> str:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        for name in names:
            if name not in EDITORS:
                raise ValueError(f"unknown method {name!r}; choose from {', '.join(EDITORS)}")
        if not names:
            raise ValueError(f"name a method; choose from {', '.join(EDITORS)}")
        return ",".join(dict.fromkeys(names))

    @model_validator(mode="after")
    def _some_records(self) -> MmeditSettings:
        if not self.vqa and not self.captioning:
            raise ValueError("give --vqa or --captioning, a JSON file of records, or both")
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods by name."""
        return tuple(self.methods.split(","))


def mmedit_settings(values: dict[str, Any]) -> MmeditSettings:
    """Return validated settings. Raises InputError naming the first wrong setting and what is allowed."""
    return checked(MmeditSettings, values)
