"""Settings shared by every job, and the roles that decide which settings change results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mmray.errors import InputError

ROLE = "role"
"""Key in a field's extra schema. A field without a role changes the results of units."""
EXECUTION, AFTER, DIGEST = "execution", "after work", "digest"


def execution(default: Any = ..., **constraints: Any) -> Any:
    """Declare a setting about where or how the work runs, which changes no result."""
    return Field(default, json_schema_extra={ROLE: EXECUTION}, **constraints)


def after_work(default: Any = ..., **constraints: Any) -> Any:
    """Declare a setting that only the merge reads; a new value needs no unit to run again."""
    return Field(default, json_schema_extra={ROLE: AFTER}, **constraints)


def known_by_digest(default: Any = ..., **constraints: Any) -> Any:
    """Declare a setting that names a model or data; the fingerprint contains its digest instead of its path."""
    return Field(default, json_schema_extra={ROLE: DIGEST}, **constraints)


def _check_workers(value: Any) -> Any:
    if value is None:
        return None
    least, colon, most = str(value).partition(":")
    if not (least.isdecimal() and int(least) >= 1 and (not colon or (most.isdecimal() and int(least) <= int(most)))):
        raise ValueError("give a number of at least 1, or MIN:MAX such as 2:16")
    return str(value)


Workers = Annotated[str | None, BeforeValidator(_check_workers)]
"""Number of actors, or MIN:MAX to let Ray scale their number; None: as many as fit."""


def worker_range(workers: str | None) -> tuple[int, int] | None:
    """Return the minimum and maximum number of workers; None for the default."""
    if workers is None:
        return None
    least, _, most = workers.partition(":")
    return int(least), int(most or least)


class JobSettings(BaseModel):
    """How any job is run; each job adds settings of its own."""

    # Docstrings of fields are also the help texts of options. A misspelled setting is an error.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    workers: Workers = execution(None)
    """Actors (model replicas): a number or MIN:MAX. With MIN:MAX, Ray adds and removes some as work and machines allow.
    Default: one per GPU or core. Cores count in a cluster without GPUs, at most four per machine."""
    gpus_per_worker: float | None = execution(None, ge=0)
    """GPUs per worker; default: 1 where the cluster has GPUs, else 0."""
    address: str | None = execution(None)
    """Ray cluster to join, auto or ray://HOST:PORT; default: a local Ray."""
    retry_failed: bool = execution(False)
    """Try units again that an earlier call quarantined."""
    unit_timeout: float | None = execution(None, gt=0)
    """Seconds after which a unit counts as failed; default: no limit. Its worker is replaced."""
    local: bool = execution(False)
    """Run in this process, without Ray."""

    @property
    def worker_range(self) -> tuple[int, int] | None:
        """Minimum and maximum number of workers; None for the default."""
        return worker_range(self.workers)

    @classmethod
    def execution_settings(cls) -> list[str]:
        """Return the names of the settings that change no result."""
        return cls._with_role(EXECUTION)

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that a unit's result depends on, without those known by digest."""
        return self.model_dump(include={*self._with_role("")})

    def merge_settings(self) -> dict[str, Any]:
        """Return the settings that only the merge reads."""
        return self.model_dump(include={*self._with_role(AFTER)})

    def fingerprint(self, digests: Mapping[str, str]) -> str:
        """Return a digest of everything that a unit's result depends on."""
        dependencies = self.result_settings() | {"digests": dict(digests)}
        return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def _with_role(cls, role: str) -> list[str]:
        extras = {name: field.json_schema_extra or {} for name, field in cls.model_fields.items()}
        return [name for name, extra in extras.items() if isinstance(extra, dict) and extra.get(ROLE, "") == role]


Settings = TypeVar("Settings", bound=BaseModel)


def checked(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """Return validated settings; raises InputError naming the first wrong setting and what is allowed."""
    try:
        return kind(**values)
    except ValidationError as error:
        raise InputError(first_problem(error, kind.model_fields)) from error


def first_problem(error: ValidationError, known: Iterable[str] = ()) -> str:
    """Return the first problem of a validation in one line: the setting, its value, what it should be.

    For an unknown setting, the most similar of those that are known is suggested.
    """
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        similar = get_close_matches(name, known, n=1)
        return f"unknown setting {name!r}" + (f"; did you mean {similar[0]!r}?" if similar else "")
    if problem["type"] == "missing":
        return f"setting {name!r} is missing"
    message = str(problem["msg"].removeprefix("Value error, "))
    # A problem of several settings together has no location, and its message names them.
    return f"setting {name} = {problem['input']!r}: {message}" if name else message
