"""Every job on Ray, with a pool that grows from one worker to two: the tables are those of this process."""

import pytest

from mmray.engine.ray import RayExecutor
from tests.engine.jobs import CASES, Case
from tests.engine.suite import Suite

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ray_gives_the_tables_of_this_process(suite: Suite, case: Case) -> None:
    place = suite.place()
    executor = RayExecutor(case.make(place, local=False, workers="1:2").settings.worker_range, None, None)
    suite.check(case, place, case.run(place, executor))
