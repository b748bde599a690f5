"""Settings of `mmray select`. Each docstring is also the help of the command line, so it stays short."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from mmray.engine.settings import JobSettings, after_work, checked, execution


class SelectionSettings(JobSettings):
    """Settings of `mmray select`."""

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
        # Tables have concepts in lower case.
        return tuple(dict.fromkeys(concept.casefold() for concept in concepts))


def selection_settings(values: dict[str, Any]) -> SelectionSettings:
    """Return validated settings. Raises InputError that names the first wrong setting and what it may be."""
    return checked(SelectionSettings, values)
