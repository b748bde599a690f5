"""Typed settings of `mmray select`, and the documentation of each."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from mmray.engine.settings import JobSettings, after_work, checked, execution


class SelectionSettings(JobSettings):
    """Everything that `mmray select` can be told."""

    run: str = execution()
    """Folder of the run."""
    concepts: tuple[str, ...] = Field(min_length=1)
    """Nouns of the captions, such as dog."""
    k: int = after_work(50, ge=1)
    """Neurons to choose."""
    samples: int = Field(400, ge=1)
    """Samples of the run to go through again."""

    @field_validator("concepts")
    @classmethod
    def _as_in_tables(cls, concepts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(concept.casefold() for concept in concepts))


def selection_settings(values: dict[str, Any]) -> SelectionSettings:
    """Return checked settings; raises InputError naming the first setting that is wrong and what is allowed."""
    return checked(SelectionSettings, values)
