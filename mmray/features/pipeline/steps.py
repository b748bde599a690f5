"""The analyses of a run that a pipeline may have as steps, each by the name of its command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmray.engine import Job, JobSettings, Progress
from mmray.engine import run as run_job
from mmray.errors import InputError
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.settings import opinion_settings
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.settings import saliency_settings
from mmray.features.select.job import SelectionJob
from mmray.features.select.settings import selection_settings
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import selectivity_settings

Follow = Callable[[Progress], None]


@dataclass(frozen=True)
class StepResult:
    """What a finished step amounts to."""

    failures: int
    """Samples, or whatever is counted, that failed."""
    quarantined: Mapping[int, str]
    """Unit → why it was given up."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Return whether all went well."""
        return not self.failures and not self.quarantined


@dataclass(frozen=True)
class Step:
    """A kind of step: how its settings are checked, and how it is run."""

    settings: Callable[[dict[str, Any]], JobSettings]
    """Checks settings, that of the run included; raises InputError."""
    run: Callable[[Any, Follow], StepResult]


def _of_job(job: type[Job[Any, Any]]) -> Callable[[Any, Follow], StepResult]:
    def run(settings: JobSettings, follow: Follow) -> StepResult:
        done = run_job(job(settings), follow=follow)
        return StepResult(done.failures, done.quarantined, done.seconds)

    return run


def _selectivity(settings: Any, follow: Follow) -> StepResult:
    done = run_selectivity(settings, follow)
    return StepResult(0, done.quarantined, done.seconds)


STEPS: dict[str, Step] = {
    "properties": Step(property_settings, _of_job(PropertiesJob)),
    "select": Step(selection_settings, _of_job(SelectionJob)),
    "selectivity": Step(selectivity_settings, _selectivity),
    "saliency": Step(saliency_settings, _of_job(SaliencyJob)),
    "hallucination": Step(opinion_settings, _of_job(HallucinationJob)),
}


def checked_steps(
    asked: list[dict[str, dict[str, Any] | None]], common: Mapping[str, Any]
) -> list[tuple[str, str, JobSettings]]:
    """Return title, kind and checked settings of each step; `common` are settings that a step doesn't give itself.

    Raises InputError naming the first step that is wrong.
    """
    steps: list[tuple[str, str, JobSettings]] = []
    for entry in asked:
        if len(entry) != 1 or not entry.keys() <= STEPS.keys():
            raise InputError(f"steps: {', '.join(entry) or 'nothing'}: name one of {', '.join(STEPS)} per step")
        ((kind, own),) = entry.items()
        count = sum(kind == before for _, before, _ in steps)
        title = f"{kind} {count + 1}" if count else kind
        try:
            steps.append((title, kind, STEPS[kind].settings({**common, **(own or {})})))
        except InputError as error:
            raise InputError(f"steps, {title}: {error}") from error
    return steps
