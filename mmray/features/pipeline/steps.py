"""The analyses that a pipeline may have as steps, by the names of their commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmray.engine import Job, JobSettings, Progress, run_side_by_side
from mmray.errors import InputError
from mmray.features.hallucination.bias_job import BiasJob
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.settings import bias_settings, hallucination_settings
from mmray.features.mmedit.job import MmeditJob
from mmray.features.mmedit.settings import mmedit_settings
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.settings import saliency_settings
from mmray.features.select.job import SelectionJob
from mmray.features.select.settings import selection_settings
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import selectivity_settings


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    failures: int
    """Samples that failed, or whatever the step's units count."""
    quarantined: Mapping[int, str]
    """Unit → why it was quarantined."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether nothing failed or was quarantined."""
        return not self.failures and not self.quarantined


@dataclass(frozen=True)
class Step:
    """A kind of step."""

    settings: Callable[[dict[str, Any]], JobSettings]
    """Validates settings, the run included; raises InputError."""
    job: type[Job[Any, Any]] | None = None
    """None for selectivity, which is two jobs, one after the other."""
    detects: bool = False
    """Whether it queries a detector."""


STEPS: dict[str, Step] = {
    "properties": Step(property_settings, PropertiesJob),
    "select": Step(selection_settings, SelectionJob),
    "selectivity": Step(selectivity_settings),
    "saliency": Step(saliency_settings, SaliencyJob, detects=True),
    "hallucination": Step(hallucination_settings, HallucinationJob, detects=True),
    "bias": Step(bias_settings, BiasJob, detects=True),
    "mmedit": Step(mmedit_settings, MmeditJob),
}


@dataclass(frozen=True)
class CheckedStep:
    """A step of a pipeline with validated settings."""

    title: str
    kind: str
    settings: Any

    def may_join(self, others: Sequence[CheckedStep]) -> bool:
        """Return whether it may run side by side with others: one job, of a different kind, on the same workers."""
        # Two jobs of one kind would need the same lease and write the same tables.
        different = all(other.kind != self.kind for other in others)
        same_workers = all(_placement(other.settings) == _placement(self.settings) for other in others)
        return STEPS[self.kind].job is not None and different and same_workers


def run_steps(steps: Sequence[CheckedStep], follow: Callable[[str, Progress], None]) -> dict[str, StepResult]:
    """Run steps, with neighbours side by side if possible, and return the result of each by title."""
    results: dict[str, StepResult] = {}
    for group in _groups(steps):
        title = ", ".join(step.title for step in group)
        # Such a step is always a group of its own; see `may_join`.
        if STEPS[group[0].kind].job is None:
            # Its driver runs two jobs and quarantines shards, but a failed sample fails its shard.
            done = run_selectivity(group[0].settings, partial(follow, title))
            results[title] = StepResult(0, done.quarantined, done.seconds)
            continue
        jobs = [job(step.settings) for step in group if (job := STEPS[step.kind].job)]
        finished = run_side_by_side(jobs, follow=partial(follow, title))
        for step, result in zip(group, finished, strict=True):
            results[step.title] = StepResult(result.failures, result.quarantined, result.seconds)
    return results


def _groups(steps: Sequence[CheckedStep]) -> list[list[CheckedStep]]:
    groups: list[list[CheckedStep]] = []
    for step in steps:
        if groups and STEPS[groups[-1][0].kind].job is not None and step.may_join(groups[-1]):
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _placement(settings: JobSettings) -> tuple[object, ...]:
    return settings.workers, settings.gpus_per_worker, settings.address, settings.local


def checked_steps(
    entries: list[dict[str, dict[str, Any] | None]], common: Mapping[str, Any], detecting: Mapping[str, Any]
) -> list[CheckedStep]:
    """Return the steps of a file with validated settings.

    `common` has defaults for settings that a step leaves out, `detecting` those of steps that query a detector.

    Raises InputError that names the first wrong step.
    """
    steps: list[CheckedStep] = []
    for entry in entries:
        if len(entry) != 1 or not entry.keys() <= STEPS.keys():
            raise InputError(f"steps: {', '.join(entry) or 'nothing'}: name one of {', '.join(STEPS)} per step")
        ((kind, own),) = entry.items()
        count = sum(step.kind == kind for step in steps)
        # Results are kept by title, so a second step of a kind needs a title of its own.
        title = f"{kind} {count + 1}" if count else kind
        try:
            steps.append(
                CheckedStep(
                    title,
                    kind,
                    STEPS[kind].settings({**common, **(detecting if STEPS[kind].detects else {}), **(own or {})}),
                )
            )
        except InputError as error:
            raise InputError(f"steps, {title}: {error}") from error
    return steps
