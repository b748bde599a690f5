"""A census or properties in this process, without Ray: driver and worker are the real ones, one after the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmray.engine import JobResult, Progress
from mmray.engine import run as run_job
from mmray.features.census.job import CensusResult, run_census
from mmray.features.census.settings import census_settings
from mmray.features.census.tables import TABLES
from mmray.features.pipeline.job import Pipeline, pipeline_settings, run_pipeline
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import property_settings
from mmray.features.saliency.job import SaliencyJob
from mmray.features.saliency.settings import saliency_settings
from mmray.runs.card import publish
from mmray.runs.run import Run
from mmray.runs.snapshots import SnapshotWriter, newest, next_fence
from mmray.storage import open_store

KEPT_TEXT = str(Path(__file__).with_name("kept_text.json"))
"""Few text-only prompts, so that an edit is quickly validated."""


def census_here(model: Path | str, data: str, out: Path | str, **settings: object) -> CensusResult:
    """Run a census without Ray."""
    follow: Callable[[Progress], None] = settings.pop("follow", lambda _: None)  # type: ignore[assignment]
    asked = {"model": str(model), "data": data, "out": str(out), "local": True, **settings}
    return run_census(census_settings(asked), follow)


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


def write_table(run: Path | str, name: str, table: pa.Table) -> None:
    """Put a table into a run, in place of one that is there; readers find it as if its job had made it."""
    store = open_store(run)
    job = "census" if name in TABLES else "tests"
    before = newest(store, job)
    writer = SnapshotWriter(store, job, next_fence(store, job, 0))
    writer.add(name, table)
    publish(store, writer.commit(before.made_from if before else {}, before.headline if before else {}))


def files(run: Run | Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of every file of a run."""
    root = Path(run.uri) if isinstance(run, Run) else run
    status = {path.relative_to(root).as_posix(): path.stat() for path in root.rglob("*") if path.is_file()}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in status.items()}
