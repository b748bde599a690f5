"""An end to a unit that hangs: whoever waits for it is told, and its worker is stopped."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TimeLimitError(Exception):
    """Raised in a unit's work once it has run too long."""


@contextmanager
def time_limit(seconds: float | None, stop: Callable[[], None], record: Callable[[], None]) -> Iterator[None]:
    """Call `record` and then `stop`, from another thread, if the block takes longer; without `seconds` never."""
    if seconds is None:
        yield
        return

    def expire() -> None:
        record()
        stop()

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interrupt_main_thread() -> None:
    """Raise TimeLimitError in the main thread; native code that hangs is not interrupted until it returns."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(TimeLimitError))
