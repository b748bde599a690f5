"""Run a command with settings from a file: `python jobs/NAME.py --config FILE.yaml [NAME=VALUE …]`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any, NoReturn

import typer

from mmray.cli import main
from mmray.errors import InputError
from mmray.terminal.config import read_config
from mmray.terminal.options import app

PER_CALL = ("retry_failed", "address")
"""Settings of a single call, which a later call need not repeat."""


def run_job(command: str) -> NoReturn:
    """Run a command with settings from a file, and exit with its status: 0, 2, 3 or 4.

    The file has the command's options and arguments by name, with underscores: `shard_size: 500`.
    """
    arguments = _arguments(command)
    main(lambda: words_of(command, read_config(arguments.config, arguments.overrides)))


def run_file_job(command: str) -> NoReturn:
    """Run a command that takes the file as its argument, such as `mmray pipeline FILE`, and exit with its status."""
    arguments = _arguments(command)
    main(lambda: [command, arguments.config, *arguments.overrides])


def _arguments(command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Run `mmray {command}` with the settings of a YAML file; see mmray {command} --help for them.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as jobs/configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="change a setting of the file: limit=100")
    return parser.parse_args()


def words_of(command: str, settings: Mapping[str, Any]) -> list[str]:
    """Return a command line with these settings; raises InputError for a setting that the command doesn't have."""
    left = {name: value for name, value in settings.items() if value is not None}
    options: list[str] = []
    positions: list[str] = []
    for parameter in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        word = parameter.opts[0]
        name = word.lstrip("-").replace("-", "_")
        if name not in left:
            continue
        value = left.pop(name)
        values = [str(item) for item in (value if isinstance(value, list) else [value])]
        if parameter.param_type_name == "argument":
            positions += values
        elif parameter.is_flag:
            # A flag without a second form is off by leaving it out.
            options += [word] if value else parameter.secondary_opts
        else:
            # One word, because the value may begin with a dash.
            options += [f"{word}={item}" for item in values]
    if left:
        raise InputError(f"unknown setting {next(iter(left))!r}; see mmray {command} --help")
    # After --, an argument that begins with a dash is not taken for an option.
    return [command, *options, "--", *positions]


def command_line(template: str, overrides: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Return the command line that runs a command with these settings, without defaults.

    `overrides` replace settings that have changed, such as RUN after a run was moved. Returns the template if the
    settings don't fit the command, such as those of a pipeline's step.
    """
    command_name = template.split()[1]
    command = typer.main.get_command(app).commands.get(command_name)  # type: ignore[attr-defined]
    if command is None:
        return template
    parameters = {parameter.name: parameter for parameter in command.params}
    known = {**settings, **{name: value for name, value in overrides.items() if name in settings}}
    if any(parameter.required and known.get(word) is None for word, parameter in parameters.items()):
        return template
    own = {
        word: value
        for word, value in known.items()
        if word in parameters
        and word not in PER_CALL
        and (parameters[word].required or value != parameters[word].default)
    }
    words = words_of(command_name, own)
    end = words.index("--")
    return shlex.join(["mmray", command_name, *words[end + 1 :], *words[1:end]])
