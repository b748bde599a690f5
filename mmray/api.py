"""The census as one call from Python."""

from __future__ import annotations

from typing import Any

from mmray.cluster.census import run_census as drive_census
from mmray.results.run import Run, open_run
from mmray.settings import census_settings


def run_census(model: str, data: str, out: str, **settings: Any) -> Run:
    """Run a census to its end, or go on with one that stopped, and open it.

    `settings` are those of `mmray census`, with underscores (`shard_size=500`); see `mmray.settings.CensusSettings`.
    Failed samples and shards are in the run's `errors` table and status. Raises InputError for bad settings or input.
    """
    drive_census(census_settings({"model": model, "data": data, "out": str(out), **settings}))
    return open_run(out)
