"""The command line. Exit status: 0 done, 2 bad input, 3 drift or damage, 4 finished with failures.

Importing a module registers its commands; `mmray.cli.features` imports those of the features.
"""

from __future__ import annotations

import codecs
import gc
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

import mmray.cli.demo
import mmray.cli.export
import mmray.cli.features
import mmray.cli.models
import mmray.cli.push
import mmray.cli.report
import mmray.cli.serve
import mmray.cli.status  # noqa: F401  they register
from mmray.errors import InputError
from mmray.storage import is_full
from mmray.terminal.options import BAD_INPUT, app, console, visible

TERMINATED = 128 + signal.SIGTERM
"""Exit status after SIGTERM, as shells report it."""
PIPED_WIDTH = 10_000
"""Console width without a terminal, so that lines are never wrapped or truncated."""
ESCAPED = "mmray-json-escapes"
"""Name of the error handler for characters that stdout's encoding lacks."""
COLLECTED_AFTER = 100_000
"""Allocations between two garbage collections; Python's 700 make importing torch and transformers a fifth slower."""
logger = logging.getLogger(__name__)
UsageError: Any = typer.BadParameter.__bases__[0]
"""Raised for a wrong option; typer's versions keep it in different modules."""


def main(words: Callable[[], Sequence[str]] = lambda: sys.argv[1:]) -> NoReturn:
    """Run the command line with these words, by default `sys.argv`; bad input prints one line and exits with status 2.

    SIGTERM stops a command like Ctrl-C, which releases its lease; the status is 143 instead of 130.
    """
    gc.set_threshold(COLLECTED_AFTER)
    _fit_output()
    with _stopped_by_sigterm() as stopped:
        try:
            _run(words)
        except SystemExit as ended:
            # typer ends every KeyboardInterrupt with 130, whichever signal raised it.
            if stopped.is_set():
                raise SystemExit(TERMINATED) from None
            raise ended


@contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """Raise KeyboardInterrupt in the block on the first SIGTERM; yields an event that is set then."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        # Later signals are ignored, so that they don't interrupt the clean-up.
        if not stopped.is_set():
            stopped.set()
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # Python allows signal handlers only in the main thread.
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(words: Callable[[], Sequence[str]]) -> NoReturn:
    try:
        # Without standalone mode, typer raises errors to us instead of printing them.
        # The words are made inside `try`: a settings file that can't be read is bad input too.
        status = app(args=words(), prog_name="mmray", standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "mmray"
        # pydantic's mark of a message that a validator wrote.
        message = error.format_message().rstrip(".").replace("Value error, ", "")
        _refuse(f"{message}; see {command} --help")
    except InputError as error:
        _refuse(str(error))
    except (BrokenPipeError, SystemExit) as error:
        # The reader of a pipe has gone, as in `mmray rank … | head`. typer turns this into SystemExit.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        # Python flushes stdout at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except OSError as error:
        if error.strerror is None:
            raise
        remedy = "make room and run the same command again to resume" if is_full(error) else "fix it and run again"
        _refuse(f"{error.filename or 'file system'}: {error.strerror}; {remedy}")
    raise SystemExit(status)


def _fit_output() -> None:
    """Escape characters that stdout can't encode, and keep lines whole without a terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPED)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that can't be encoded by JSON escapes, which are valid in --json and unambiguous elsewhere."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escape)


def _refuse(message: str) -> NoReturn:
    from mmray.storage import masked

    # With --verbose, where it was raised.
    logger.info("refused", exc_info=True)
    if message:
        # One line, whatever the error quotes, and without the passwords that an address may hold.
        print(f"mmray: {visible(masked(' '.join(message.split())))}", file=sys.stderr)
    raise SystemExit(BAD_INPUT) from None
