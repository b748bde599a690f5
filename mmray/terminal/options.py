"""Shared by all commands: the application, the console, options derived from settings, exit status."""

from __future__ import annotations

import inspect
import json
import logging
import shlex
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mmray.engine.settings import JobSettings
from mmray.terminal.help import COLUMNS, EXECUTION, OPTIONS, WIDTH, App, CommandGroup, summary
from mmray.version import VERSION

if TYPE_CHECKING:
    from mmray.engine import Job, JobResult
    from mmray.engine.job import Progress as JobProgress

BAD_INPUT = 2
"""Exit status after an InputError, a wrong option, or no command."""
INCOMPLETE = 4
"""Exit status of a run that finished with failed samples or quarantined units."""

app = App(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    rich_markup_mode=None,
    help="Find, explain and edit the multi-modal neurons of vision-language models, as Ray jobs.",
)
SHORT = {"model": "-m", "data": "-d", "out": "-o", "limit": "-n", "workers": "-w"}
"""Setting → its short option."""
CHOICES_WIDTH = 20
"""Characters of a list of choices that an option shows as its value; longer lists are in its help."""
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Control characters → how they are shown."""


def visible(text: str) -> str:
    """Return text with control characters escaped, because captions and names may contain terminal sequences."""
    return text.translate(CONTROL)


class _Terminal(Console):
    """A console that escapes control characters in whatever it prints."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def _version(requested: bool) -> None:
    if requested:
        print(f"mmray {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show log messages, and where an error was raised.")
    ] = False,
) -> None:
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("mmray").setLevel(logging.INFO)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(BAD_INPUT)


console = _Terminal(highlight=False, soft_wrap=False)


def help_of(name: str, settings: type[BaseModel]) -> str:
    """Return the summary of a setting's documentation; the README of its room has all of it."""
    return summary(settings.model_fields[name].description).replace("`", "")


def option(name: str, settings: type[BaseModel]) -> Any:
    """Return the option for a setting, in the group that its kind belongs to."""
    field = settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    # A setting that may also be None needs a flag for each of true and false.
    names = [f"{flag}/--no-{name.replace('_', '-')}" if field.annotation == (bool | None) else flag]
    names += [SHORT[name]] if name in SHORT else []
    choices, text = _choices(field.annotation), help_of(name, settings)
    # Of `int | None`, the kind of number.
    numbers = {int: "N", float: "X"}
    kind = next((numbers[part] for part in (field.annotation, *get_args(field.annotation)) if part in numbers), None)
    metavar = "|".join(choices) or kind
    if metavar and len(metavar) > CHOICES_WIDTH:
        metavar, text = "NAME", f"{text} One of {', '.join(choices)}."
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=_group(name, settings))


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the values of a Literal, or of one that may be None; nothing for other types."""
    return next((get_args(part) for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal), ())


def _group(name: str, settings: type[BaseModel]) -> str:
    """Return the heading that an option is listed under."""
    if name.endswith("_column"):
        return COLUMNS
    changes_nothing = issubclass(settings, JobSettings) and name in settings.execution_settings()
    return EXECUTION if changes_nothing and not settings.model_fields[name].is_required() else OPTIONS


def argument(name: str, settings: type[BaseModel]) -> Any:
    """Return the argument for a setting, with its documentation as help."""
    return typer.Argument(metavar=name.upper(), help=help_of(name, settings))


def with_settings(
    settings: type[BaseModel], arguments: Collection[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command to take every setting that is not a parameter of its own, passed as keyword arguments.

    Each is an option, except those named in `arguments`. `defaults` override those of the settings.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = {
            # Keyword-only parameters may come in any order, with or without defaults.
            name: value.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, value in inspect.signature(command, eval_str=True).parameters.items()
            if value.kind is not inspect.Parameter.VAR_KEYWORD
        }
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, inspect.Parameter.empty if field.is_required() else field.default),
                annotation=Annotated[field.annotation, (argument if name in arguments else option)(name, settings)],
            )
            for name, field in _own_first(settings)
            if name not in own
        ]
        parameters += own.values()
        # typer reads types from the annotations and everything else from the signature.
        command.__annotations__ = {value.name: value.annotation for value in parameters}
        vars(command)["__signature__"] = inspect.Signature(parameters)
        return command

    return decorate


def _own_first(settings: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """Return the fields of settings, with those shared by all jobs last."""
    return sorted(settings.model_fields.items(), key=lambda field: field[0] in JobSettings.model_fields)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: a local path or s3://bucket/prefix.")]


def finish(result: JobResult, noun: str, *, quiet: bool = False) -> None:
    """Print failures and quarantined units unless `quiet`, and exit with the matching status.

    `noun` names what may fail, in the singular.
    """
    if not quiet:
        for number, reason in result.quarantined.items():
            say(f"unit {number} quarantined: {reason}", "red")
        if result.failures:
            say(f"{plural(result.failures, noun)} failed; mmray status says why", "yellow")
    if not result.complete:
        raise typer.Exit(INCOMPLETE)


@contextmanager
def resumable(what: str = "") -> Iterator[None]:
    """Print how to resume if the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        warn(f"stopped; run the same command again to resume {what}".rstrip())
        raise


@contextmanager
def show_progress(noun: str = "samples", what: str = "") -> Iterator[Callable[[JobProgress], None]]:
    """Yield a function that shows progress; an interruption prints how to resume `what`."""
    # Imported here: progress bars are slow to import, and most commands show none.
    from mmray.terminal.progress import follow_progress

    with resumable(what), follow_progress(Console(stderr=True, highlight=False), noun) as follow:
        yield follow


def run_with_progress(job: Job[Any, Any]) -> JobResult:
    """Run a job and show its progress."""
    from mmray.engine import run

    with show_progress(job.unit_noun) as follow:
        return run(job, follow=follow)


def plural(count: int, word: str) -> str:
    """Return a count with its noun: 1 sample, 2 samples."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def say(line: str, style: str | None = None) -> None:
    """Print a line without wrapping or markup."""
    # Paths must stay whole at any width, and their brackets must not be taken for markup.
    console.print(line, style=style, markup=False, soft_wrap=True)


def say_next(*commands: str) -> None:
    """Print which commands are useful next; words in capitals are for the user to replace."""
    say(f"next: {' · '.join(commands)}")


def command_line(name: str, *words: object) -> str:
    """Return a command line of mmray, quoted for a shell."""
    return shlex.join(["mmray", name, *map(str, words)])


def say_json(value: Any, *, allow_nan: bool = True) -> None:
    """Print a value as one line of JSON; raises ValueError for a NaN that is not allowed."""
    # Not through the console, which wraps lines.
    print(json.dumps(value, ensure_ascii=False, allow_nan=allow_nan))


def warn(line: str) -> None:
    """Print a line to standard error, where it is no part of the result."""
    print(f"mmray: {line}", file=sys.stderr)
