"""Work on a batch of items, and split it in halves on failure, until the failing item is alone."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

from mmray.errors import InputError

FAILURES = (IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models and processors raise when memory runs out, or for a sample that they can't handle."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
USUAL = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
"""What glibc itself raises them to, in a process with large blocks."""
KEPT = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: 1 << 30}
FREED = 256 << 20
"""Freed bytes that a process may keep between batches."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def split_on_failure(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Result],
    alone: Callable[[Item, str], None],
    errors: tuple[type[Exception], ...] = (InputError, *FAILURES),
) -> list[Result]:
    """Return the results of the work on all items, or on parts of them in order.

    A part that raises one of `errors` is split in halves. `alone` is called with each single item that fails, and the
    reason. Work that fails must have no side effects.
    """
    if not items:
        return []
    try:
        return [work(items)]
    except errors as error:
        # Keep only the message: the exception references the frames, and so the memory, of the failed work.
        problem = str(error)
    if len(items) == 1:
        alone(items[0], problem)
        return []
    # Before the halves run: the allocator keeps blocks sized for the whole batch.
    free_memory()
    middle = len(items) // 2
    return [done for half in (items[:middle], items[middle:]) for done in split_on_failure(half, work, alone, errors)]


def free_memory() -> None:
    """Return a failed forward's cached memory to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def heap_kept(device: torch.device) -> Iterator[None]:
    """Keep what is freed inside the block for what is allocated next, until `trim_heap`.

    Of effect with glibc and a model on a CPU alone. By itself glibc returns tensors of 32 MB to the system at once. The
    fresh pages of the next ones cost as much as a narrow model's arithmetic.
    """
    if device.type != "cpu":
        yield
        return
    _set_heap(KEPT)
    try:
        yield
    finally:
        _set_heap(USUAL)
        trim_heap()


def _set_heap(parameters: dict[int, int]) -> None:
    # Other C libraries have no such function.
    with suppress(AttributeError, OSError):
        for parameter, value in parameters.items():
            ctypes.CDLL(None).mallopt(parameter, value)


def trim_heap(kept: int = 0) -> None:
    """Return freed memory to the system, if there is more than so many bytes of it; of effect with glibc alone.

    glibc keeps freed blocks of a few MB, and uses other ones next time.
    """
    # Other C libraries have no such functions, or none of these names.
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        if _freed(library) > kept:
            library.malloc_trim(0)


class _Mallinfo(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def _freed(library: ctypes.CDLL) -> float:
    """Return how many freed bytes the process keeps; infinity if glibc is too old to say."""
    ask = getattr(library, "mallinfo2", None)
    if ask is None:
        return math.inf
    ask.restype = _Mallinfo
    # The field `fordblks`.
    return int(ask().numbers[8])
