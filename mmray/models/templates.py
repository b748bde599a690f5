"""Render a checkpoint's chat template within limits: it is a program that comes with the weights."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from jinja2 import TemplateError

from mmray.errors import InputError

SECONDS = 10.0
"""Longest time that a template may take; real ones take milliseconds."""
CHARACTERS = 100_000
"""Most text that a template may write around one question."""


def render(name: str, processor: Any, messages: list[dict[str, Any]], *, seconds: float = SECONDS) -> str:
    """Return the messages in the processor's chat template, up to where the answer begins.

    Raises InputError, naming the model, if the template fails, runs longer than `seconds`, or writes more than
    `CHARACTERS`.
    """
    answer: list[str] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # noqa: BLE001  raised again in the caller's thread
            failure.append(error)

    # A daemon: a template that swallows the exception must not keep the process alive.
    thread = threading.Thread(target=run, name="chat template", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # Templates are compiled to Python, so an asynchronous exception ends even an endless loop.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError))
        raise InputError(f"{name}: its chat template has not ended after {seconds:g} seconds; correct the template")
    if failure:
        if not isinstance(
            failure[0], (TemplateError, MemoryError, OverflowError, RecursionError, TypeError, ValueError)
        ):
            raise failure[0]
        reason = " ".join(str(failure[0]).split())[:200] or type(failure[0]).__name__
        raise InputError(f"{name}: its chat template fails ({reason}); correct the template") from failure[0]
    if len(answer[0]) > CHARACTERS:
        raise InputError(f"{name}: its chat template writes {len(answer[0]):,} characters around a question of a line")
    return answer[0]
