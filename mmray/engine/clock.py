"""Profile a unit: seconds per phase of work, which its receipt records, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")

_phases: ContextVar[dict[str, float] | None] = ContextVar("phases", default=None)
"""Seconds by phase of the current unit."""
_phase: ContextVar[str | None] = ContextVar("phase", default=None)
"""The current phase."""


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Collect the seconds of every `phase` within the block, in this thread."""
    seconds: dict[str, float] = defaultdict(float)
    tokens = _phases.set(seconds), _phase.set(None)
    try:
        yield seconds
    finally:
        _phases.reset(tokens[0])
        _phase.reset(tokens[1])


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time of a block, or of a decorated function, as a phase of the current unit: read, forward, score, …

    Does nothing outside a unit. CUDA is asynchronous: time on a GPU counts for the phase that waits for the result,
    which may be the next one.
    """
    seconds, outer, began = _phases.get(), _phase.get(), time.perf_counter()
    token = _phase.set(name)
    try:
        yield
    finally:
        _phase.reset(token)
        if seconds is not None:
            spent = time.perf_counter() - began
            seconds[name] += spent
            # A nested phase does not count for the outer one as well.
            if outer is not None:
                seconds[outer] -= spent


def timed(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, counting the time to produce each as a phase."""
    iterator = iter(items)
    while True:
        with phase(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def peak_memory() -> dict[str, int]:
    """Return this process's peak memory so far, in bytes: `host`, and `gpu` if it uses one."""
    # `ru_maxrss` is in kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    # Not imported here: a job without a model has no torch.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return peak
