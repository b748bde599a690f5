"""What every command shares: the application, the console, options and their help."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mmray.engine.settings import JobSettings
from mmray.version import VERSION

if TYPE_CHECKING:
    from mmray.engine import Job, JobResult
    from mmray.terminal.progress import Counts

INCOMPLETE = 4
"""Exit status of a run that ended although some samples or shards failed."""

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    rich_markup_mode="markdown",
    help="Multi-modal neurons of vision-language models, found and ranked as distributed Ray jobs.",
)
CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Characters that a terminal obeys instead of showing, as they are shown."""


def visible(text: str) -> str:
    """Return text of any origin so that a terminal shows it: captions and names may hold escape sequences."""
    return text.translate(CONTROL)


class _Terminal(Console):
    """Shows the control characters of what it is given; only its own styles are obeyed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments of a renderable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def _version(asked: bool) -> None:
    if asked:
        print(f"mmray {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


console = _Terminal(highlight=False, soft_wrap=False)


def help_of(name: str, settings: type[BaseModel]) -> str:
    """Return the documentation of a setting, in one line."""
    return " ".join((settings.model_fields[name].description or "").split())


def option(name: str, settings: type[BaseModel]) -> Any:
    """Return the option of that setting, its documentation as help."""
    field = settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    # Where None is a third state next to yes and no, both have names.
    names = f"{flag}/--no-{name.replace('_', '-')}" if field.annotation == (bool | None) else flag
    return typer.Option(names, help=help_of(name, settings))


def argument(name: str, settings: type[BaseModel]) -> Any:
    """Return the argument of that setting, its documentation as help."""
    return typer.Argument(metavar=name.upper(), help=help_of(name, settings))


def with_settings(
    settings: type[BaseModel], arguments: Collection[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every setting that it does not take itself, handed on as a keyword.

    Each is an option, except those named as `arguments`. `defaults` are the command's own.
    """

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = {
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
        # typer reads the types from the one and the rest from the other.
        command.__annotations__ = {value.name: value.annotation for value in parameters}
        vars(command)["__signature__"] = inspect.Signature(parameters)
        return command

    return give


def _own_first(settings: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """Return the fields of settings, those that every job has last."""
    return sorted(settings.model_fields.items(), key=lambda field: field[0] in JobSettings.model_fields)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: a local path or s3://bucket/prefix.")]


class Ended(Protocol):
    """What came of a piece of work."""

    @property
    def quarantined(self) -> Mapping[int, str]:
        """Why units were given up, by unit."""

    @property
    def failures(self) -> int:
        """Samples that failed."""

    @property
    def complete(self) -> bool:
        """Whether nothing failed and nothing was given up."""


def end(outcome: Ended, what: str, *, quiet: bool = False) -> None:
    """Say what of a piece of work failed or was quarantined, unless told to be quiet, and exit with the status for it.

    `what` names one of the things that may fail.
    """
    if not quiet:
        for number, reason in outcome.quarantined.items():
            say(f"unit {number} quarantined: {reason}", "red")
        if outcome.failures:
            say(f"{plural(outcome.failures, what)} failed", "yellow")
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


@contextmanager
def resumable(what: str = "") -> Iterator[None]:
    """Have a stop within the block say, before it ends the command, how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"mmray: stopped; run the same command again to resume {what}".rstrip(), file=sys.stderr)
        raise


@contextmanager
def followed(things: str = "samples", what: str = "") -> Iterator[Callable[[Counts], None]]:
    """Yield what shows how many of these things are done; a stop within the block says how to resume."""
    from mmray.terminal.progress import follow_progress

    with resumable(what), follow_progress(Console(stderr=True, highlight=False), things) as follow:
        yield follow


def run_followed(job: Job[Any, Any]) -> JobResult:
    """Run a job, and show how far it is."""
    from mmray.engine import run

    with followed(job.unit_noun) as follow:
        return run(job, follow=follow)


def plural(count: int, word: str) -> str:
    """Return a number with what it counts: 1 sample, 2 samples."""
    return f"{count:,} {word}{'s' * (count != 1)}"


def say(line: str, style: str | None = None) -> None:
    """Print a line as it is."""
    # A path stays whole at any width, and brackets in it are no markup.
    console.print(line, style=style, markup=False, soft_wrap=True)
