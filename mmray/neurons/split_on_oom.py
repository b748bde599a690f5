"""Work on some items at once, and in halves where that fails, until what can't be done is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mmray.errors import InputError

FAILURES = (IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What models and processors raise where memory runs out, or at a sample that they can't take."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def split_on_failure(
    items: Sequence[Item],
    work: Callable[[Sequence[Item]], Result],
    alone: Callable[[Item, str], None],
    errors: tuple[type[Exception], ...] = (InputError, *FAILURES),
) -> list[Result]:
    """Return what the work gives of all items, or of parts of them in order.

    What raises one of `errors` is done again in halves; `alone` hears of each item that can't be done by itself, and
    why. The work must leave no trace where it fails.
    """
    if not items:
        return []
    try:
        return [work(items)]
    except errors as error:
        # Only the message leaves this block: the error holds the frames, and so the memory, of what failed.
        problem = str(error)
    if len(items) == 1:
        alone(items[0], problem)
        return []
    free_memory()
    middle = len(items) // 2
    return [done for half in (items[:middle], items[middle:]) for done in split_on_failure(half, work, alone, errors)]


def free_memory() -> None:
    """Give back what a failed forward has left on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
