"""Where a unit's time goes: phases of work, timed where they happen and kept in the unit's receipt."""

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
"""Seconds by phase of the unit that this context works on."""
_phase: ContextVar[str | None] = ContextVar("phase", default=None)
"""The phase that it is in."""


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
    """Count the block's time, or a decorated function's, as that phase of the unit at work: read, forward, score, …

    A phase within another is not counted as the other's. Without a unit at work nothing is counted. On a GPU a phase
    ends when its results are asked for, which may be in the next one.
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
            if outer is not None:
                seconds[outer] -= spent


def timed(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; the time that each takes to come is that phase's."""
    waiting = iter(items)
    while True:
        with phase(name):
            try:
                item = next(waiting)
            except StopIteration:
                return
        yield item


def peak_memory() -> dict[str, int]:
    """Return the most bytes that this process has held so far: of the host, and of the GPU where it uses one."""
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["gpu"] = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return peak
