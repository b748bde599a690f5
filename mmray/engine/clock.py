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

T = TypeVar("T")

_phases: ContextVar[dict[str, float] | None] = ContextVar("phases", default=None)
"""Seconds by phase of the unit that this context works on."""


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Collect the seconds of every `phase` within the block, in this thread."""
    seconds: dict[str, float] = defaultdict(float)
    token = _phases.set(seconds)
    try:
        yield seconds
    finally:
        _phases.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the block's time as that phase of the unit at work: read, forward, score, reduce, …

    Without a unit at work nothing is counted. On a GPU a phase ends when its results are asked for, which may be in
    the next one.
    """
    seconds, began = _phases.get(), time.perf_counter()
    try:
        yield
    finally:
        if seconds is not None:
            seconds[name] += time.perf_counter() - began


def each_in_phase(name: str, items: Iterable[T]) -> Iterator[T]:
    """Yield the items; the time that each takes to come counts as that phase, what is done with it does not."""
    iterator = iter(items)
    while True:
        with phase(name):
            try:
                item = next(iterator)
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
