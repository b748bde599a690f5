"""Every job on Ray, with a pool that grows from one worker to two: the tables are those of this process."""

import pytest
import torch

from mmray.engine.ray import RayExecutor
from mmray.engine.session import actor_pool, machines
from tests.engine.jobs import CASES, Case
from tests.engine.suite import Suite

pytestmark = pytest.mark.slow
RANGE = (1, 2)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ray_gives_the_tables_of_this_process(suite: Suite, case: Case) -> None:
    place = suite.place()
    result = case.run(place, RayExecutor(RANGE, None, None))
    units = len(case.make(place).plan().units)
    threads = actor_pool(RANGE, None, machines(), units).threads
    if threads > 1:
        # The only worker has all cores, and how many threads add up a product changes its last bit.
        torch.set_num_threads(threads)
        try:
            here = suite.place()
            assert case.left(place, result) == case.left(here, case.run(here))
        finally:
            torch.set_num_threads(1)
    else:
        suite.check(case, place, result)
