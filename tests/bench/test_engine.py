"""Many units of no work: the driver's time per unit and its memory stay small."""

import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmray.engine import LocalExecutor
from tests.bench.engine import Cost, measure

pytestmark = pytest.mark.slow

PER_UNIT = 5e-3
"""Seconds of the driver per unit."""
GROWTH = 8.0
"""MiB that a driver on Ray may grow by between a tenth of the units and all: caches and fragments, nothing per unit."""
GROWTH_HERE = 3.2
"""The same of this process, whose caches are full earlier."""


@pytest.fixture
def out() -> Iterator[str]:
    """A folder in memory where there is one: a unit is ten files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield folder


def check(cost: Cost, growth: float) -> None:
    told = "\n".join(cost.lines())
    assert cost.driver <= PER_UNIT * cost.units, told
    assert cost.resident <= growth, told
    assert cost.python <= growth / 4, told


def test_many_units_in_this_process(out: str) -> None:
    check(measure(out, 4_000, LocalExecutor()), GROWTH_HERE)


def test_python_keeps_nothing_of_a_unit(out: str) -> None:
    tracemalloc.start()
    try:
        cost = measure(out, 1_000, LocalExecutor())
    finally:
        tracemalloc.stop()
    assert cost.python <= 0.5, "\n".join(cost.lines())


def test_many_units_on_ray(out: str, ray_here: str) -> None:
    from mmray.engine.ray import RayExecutor

    check(measure(out, 3_000, RayExecutor((2, 2), None, None)), GROWTH)
