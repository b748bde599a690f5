"""How `--help` looks: commands and options in groups, one line each where it fits, and examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

GROUPS = ("Run", "Read", "Understand", "Edit", "Models")
"""Headings of commands, in order."""
SECTIONS = ARGUMENTS, OPTIONS, COLUMNS, EXECUTION = "Arguments", "Options", "Columns of the data", "Execution"
"""Headings of a command's parameters, in order."""
WIDTH = 100
"""Most columns of a help text."""
NAMES_WIDTH = 30
"""Most columns of an option's names and value; the text after longer ones starts on its own line."""


class App(typer.Typer):
    """An application whose commands have a group and examples."""

    def command(  # type: ignore[override]  # a command without a group would not be listed
        self, name: str | None = None, *, group: str, examples: Sequence[str] = (), help: str | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a command under one of `GROUPS`; its help ends with the examples."""
        # Without the mark, an epilog's lines are joined.
        epilog = "\n".join(("\b", *examples)) if examples else None
        return super().command(name, cls=Command, rich_help_panel=group, epilog=epilog, help=help)


class Command(TyperCommand):
    """A command that lists its options under their headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, `--help` last under its heading."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in SECTIONS}
        for param in self.get_params(ctx):
            if isinstance(param, TyperArgument):
                sections[ARGUMENTS].append((param.metavar or str(param.name).upper(), param.help or ""))
            elif isinstance(param, TyperOption):
                sections[param.rich_help_panel or OPTIONS].append(_option(param))
        _write(formatter, sections.items())

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on its line."""
        if self.epilog:
            with formatter.section(_heading("Examples")):
                # The first line is the mark.
                for line in self.epilog.splitlines()[1:]:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


SHOW_COMPLETION = "--show-completion"
"""An option that typer adds."""


class CommandGroup(TyperGroup):
    """The list of commands, under their headings."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options; one that few need is not listed, because the list of commands has to fit on a screen."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            param.hidden = param.hidden or SHOW_COMPLETION in param.opts
        return params

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the first sentence of its help."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            sections[command.rich_help_panel].append((name, first_sentence(command.help)))
        _write(formatter, sections.items())


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a help text, in one line."""
    first, _, _ = " ".join((text or "").split()).partition(". ")
    return f"{first.rstrip('.')}."


def summary(text: str | None) -> str:
    """Return what a line of help says of an option: the first sentence of its documentation, and its default."""
    first, *others = " ".join((text or "").split()).rstrip(".").split(". ")
    return ". ".join([first, *(one for one in others if one.startswith("Default: "))]) + "."


def _option(param: TyperOption) -> tuple[str, str]:
    """Return the names of an option with its value, and its help with the default."""
    names = ", ".join(sorted([*param.opts, *param.secondary_opts], key=lambda name: name.startswith("--")))
    default = param.default
    # Flags that are off, and settings that are worked out from others, have no default to show. Zero is one.
    shown = default is not None and default is not False and default not in ("", (), []) and not callable(default)
    given = ", ".join(map(str, default)) if isinstance(default, list | tuple) else default
    remark = " [required]" if param.required else f" [{given}]" if shown else ""
    value = "" if param.is_flag else f" {param.metavar or 'TEXT'}"
    return names + value, (param.help or "") + remark


def _write(formatter: Any, sections: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> None:
    for name, rows in sections:
        if rows:
            with formatter.section(_heading(name)):
                formatter.write_dl(rows, col_max=NAMES_WIDTH)


def _heading(name: str) -> str:
    return typer.style(name, bold=True)
