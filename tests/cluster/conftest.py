"""One local Ray for all tests of this room, with an S3 on loopback that its workers see too."""

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_here(bucket: str) -> Iterator[str]:
    """Start Ray once; its workers have the environment of this moment. Returns the bucket."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    import ray
    import ray.data

    # "local": a cluster that other tests have started at the same time is not joined.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield bucket
    ray.shutdown()
