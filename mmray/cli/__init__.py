"""The command line: parse, call, print. Exit status 0 done, 2 bad input, 3 drift, 4 finished but something failed.

Commands stand in the rooms of their features; `mmray.cli.commands` imports all of them.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

import mmray.cli.commands  # noqa: F401  they register
from mmray.errors import InputError
from mmray.storage import is_full
from mmray.terminal.options import app, console, visible

BAD_INPUT = 2
"""Exit status of a call that can't be carried out as it is."""
TERMINATED = 128 + signal.SIGTERM
"""Exit status of a call that SIGTERM stopped."""
PIPED_WIDTH = 10_000
"""Columns of what is no terminal: its lines are as long as they are, and nothing is cut."""
ESCAPED = "mmray-json-escapes"
"""Name of the handler of characters that standard output's encoding lacks."""
UsageError: Any = typer.BadParameter.__bases__[0]
"""What a wrong option raises; where it lies depends on typer's version."""


def main(words: Callable[[], Sequence[str]] = lambda: sys.argv[1:]) -> NoReturn:
    """Run the command line with these words, by default the process's; bad input is one line and status 2.

    SIGTERM stops a command as Ctrl-C does: its lease is released, and the status is 143 instead of 130.
    """
    _fit_output()
    with _stopped_by_sigterm() as stopped:
        try:
            _run(words)
        except SystemExit as ended:
            if stopped.is_set():
                raise SystemExit(TERMINATED) from None
            raise ended


@contextmanager
def _stopped_by_sigterm() -> Iterator[threading.Event]:
    """Raise KeyboardInterrupt in the block on the first SIGTERM; yields what is set then."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if not stopped.is_set():
            stopped.set()
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(words: Callable[[], Sequence[str]]) -> NoReturn:
    try:
        status = app(args=words(), prog_name="mmray", standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        # Without any arguments the help is shown, and that is all.
        command = error.ctx.command_path if error.ctx else "mmray"
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help" if error.format_message() else "")
    except InputError as error:
        _refuse(str(error))
    except (BrokenPipeError, SystemExit) as error:
        # The reader of a pipe has gone (`mmray rank … | head`): not an error of ours, though typer makes it an exit.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except OSError as error:
        if error.strerror is None:
            raise
        cure = "make room and run the same command again to resume" if is_full(error) else "fix it and run again"
        _refuse(f"{error.filename or 'file system'}: {error.strerror}; {cure}")
    raise SystemExit(status)


def _fit_output() -> None:
    """Let a terminal that is not UTF-8 have every character, and a pipe whole lines."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=ESCAPED)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Return what can't be encoded as JSON escapes: valid within JSON, and told apart from each other anywhere."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escape)


def _refuse(message: str) -> NoReturn:
    from mmray.storage import masked

    if message:
        print(f"mmray: {visible(masked(' '.join(message.split())))}", file=sys.stderr)
    raise SystemExit(BAD_INPUT) from None
