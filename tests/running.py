"""A census or properties in this process, without Ray: driver and worker are the real ones, one after the other."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmray.cluster import census
from mmray.cluster.census import Outcome
from mmray.cluster.pipeline import Pipeline, pipeline_settings, run_pipeline
from mmray.cluster.properties import PropertiesJob
from mmray.cluster.saliency import SaliencyJob
from mmray.engine import JobResult, Progress
from mmray.engine import run as run_job
from mmray.evaluation.properties.settings import property_settings
from mmray.perception.settings import saliency_settings
from mmray.settings import CensusSettings, census_settings


def without_ray() -> AbstractContextManager[None]:
    """Make `run_census`, also that of the command line, do its work in this process."""
    receipts = census._receipts

    def here(settings: CensusSettings, *rest: Any) -> Iterator[dict[str, Any]]:
        return receipts(settings.model_copy(update={"local": True}), *rest)

    return patch.multiple(census, ray_session=lambda _: nullcontext(), _receipts=here)


def census_here(model: Path | str, data: str, out: Path | str, **settings: object) -> Outcome:
    """Run a census without Ray."""
    follow: Callable[[Progress], None] = settings.pop("follow", lambda _: None)  # type: ignore[assignment]
    asked = {"model": str(model), "data": data, "out": str(out), "local": True, **settings}
    return census.run_census(census_settings(asked), follow)


def properties_here(run: Path | str, **settings: object) -> JobResult:
    """Measure a run's properties without Ray."""
    follow: Callable[[Progress], None] = settings.pop("follow", lambda _: None)  # type: ignore[assignment]
    asked = property_settings({"run": str(run), "local": True, **settings})
    return run_job(PropertiesJob(asked), follow=follow)


def saliency_here(run: Path | str, **settings: object) -> JobResult:
    """Measure the saliency of a run's words without Ray."""
    follow: Callable[[Progress], None] = settings.pop("follow", lambda _: None)  # type: ignore[assignment]
    asked = saliency_settings({"run": str(run), "local": True, **settings})
    return run_job(SaliencyJob(asked), follow=follow)


def pipeline_here(settings: dict[str, Any]) -> Pipeline:
    """Run a pipeline without Ray."""
    return run_pipeline(pipeline_settings(settings | {"local": True}))
