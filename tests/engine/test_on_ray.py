"""Every job on Ray: its tables, and all else that it leaves behind, are those of this process."""

import pytest

from mmray.engine.ray import RayExecutor
from tests.engine.jobs import CASES, Case
from tests.engine.suite import Suite

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]
GROWING = {"letters", "census"}
"""Jobs whose pool grows from one worker to two; the others have one, because each has everything to import."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ray_gives_the_tables_of_this_process(suite: Suite, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = case.name in GROWING
    # However few the units, actors work on one while they finish another.
    monkeypatch.setattr("mmray.engine.ray.OVERLAPPED_FROM", 0)
    if not growing:
        # How many threads add up a product changes its last bit: the only worker has one, as this process has.
        monkeypatch.setattr("mmray.engine.ray.machines", lambda: [(1.0, 0.0)])
    place = suite.place()
    suite.check(case, place, case.run(place, RayExecutor((1, 1 + growing), None, None)))
