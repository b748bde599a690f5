"""Signatures and documentation of the functions in `mmray.api`, from the settings that they take."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel

from mmray.engine.settings import JobSettings
from mmray.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])
Executor = Literal["ray", "local"]
OPTION = re.compile(r"--(?P<name>[a-z][a-z-]*)")
COMMAND_OR_OPTION = re.compile(rf"(?P<command>\bmmray [^;,]*)|{OPTION.pattern}")
EXECUTOR = "Where the job runs: on Ray, or in this process."


def takes(settings: type[BaseModel], *without: str) -> Callable[[Function], Function]:
    """Give a function with `**settings` a keyword argument per field of these settings, with its documentation.

    Fields that the function has under their own name are left out, and those in `without`, which it sets itself. The
    field `local` is the argument `executor` here. `help` and editors show what results. Errors name arguments, not
    options.
    """

    def document(function: Function) -> Function:
        # Evaluated, because a module with postponed annotations has them as texts, and settings have types.
        signature = inspect.signature(function, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
        added = list(_arguments(settings, {one.name for one in own} | set(without)))
        lines = [_described(parameter, text) for parameter, text in added]
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Settings:", *lines])

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return function(*arguments, **named)
            except InputError as error:
                raise type(error)(_of_arguments(str(error))) from None

        # By `vars`, because type checkers know no such attribute of a function.
        vars(call)["__signature__"] = signature.replace(parameters=[*own, *(parameter for parameter, _ in added)])
        return cast(Function, call)

    return document


def _of_arguments(message: str) -> str:
    """Return a message with options written as arguments, except in commands that it names."""
    return COMMAND_OR_OPTION.sub(lambda at: at[0] if at["command"] else _as_argument(at), message)


def _arguments(settings: type[BaseModel], without: set[str]) -> Iterator[tuple[Parameter, str]]:
    # How any job runs comes last: it is the same everywhere.
    for name, field in sorted(settings.model_fields.items(), key=lambda one: one[0] in JobSettings.model_fields):
        if name == "local":
            yield Parameter("executor", Parameter.KEYWORD_ONLY, default="ray", annotation=Executor), EXECUTOR
        elif name not in without:
            default = Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
            parameter = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=field.annotation)
            yield parameter, OPTION.sub(_as_argument, " ".join((field.description or "").split()))


def _described(parameter: Parameter, text: str) -> str:
    return "\n".join([f"    {parameter}", *textwrap.wrap(text, 112, initial_indent=" " * 8, subsequent_indent=" " * 8)])


def _as_argument(option: re.Match[str]) -> str:
    return str(option["name"]).replace("-", "_")
