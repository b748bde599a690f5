"""Every job on Ray: its tables, and all else that it leaves behind, are those of this process."""

import pytest
import torch

from mmray.engine.ray import RayExecutor
from mmray.engine.session import actor_pool, machines
from tests.engine.jobs import CASES, Case
from tests.engine.suite import Suite

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]
GROWING = {"letters", "census"}
"""Jobs whose pool grows from one worker to two; the others have one, because each has everything to import."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ray_gives_the_tables_of_this_process(suite: Suite, case: Case) -> None:
    place, here = suite.place(), suite.place()
    workers = (1, 1 + (case.name in GROWING))
    result = case.run(place, RayExecutor(workers, None, None))
    threads = actor_pool(workers, None, machines(), len(case.make(place).plan().units)).threads
    # The only worker has all cores, and how many threads add up a product changes its last bit.
    torch.set_num_threads(threads)
    try:
        assert case.left(place, result) == case.left(here, case.run(here))
    finally:
        torch.set_num_threads(1)
