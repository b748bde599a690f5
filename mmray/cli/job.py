"""Commands as jobs: `python jobs/NAME.py --config FILE.yaml [NAME=VALUE …]` is the command with the file's settings."""

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

ONCE = ("retry_failed", "address")
"""Settings of one call, which a later one need not share."""


def run_job(command: str) -> NoReturn:
    """Run a command of mmray with settings from a file, and end with its status: 0, 2, 3 or 4.

    The file holds the command's options and arguments by their names, with underscores: `shard_size: 500`. Bad input
    is one line on stderr, as on the command line.
    """
    given = _given(command)
    main(lambda: words_of(command, read_config(given.config, given.overrides)))


def run_file_job(command: str) -> NoReturn:
    """Run a command that takes the file itself, `mmray pipeline FILE`, and end with its status."""
    given = _given(command)
    main(lambda: [command, given.config, *given.overrides])


def _given(command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Run `mmray {command}` with the settings of a YAML file; see mmray {command} --help for them.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, such as jobs/configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="change a setting of the file: limit=100")
    return parser.parse_args()


def words_of(command: str, settings: Mapping[str, Any]) -> list[str]:
    """Return the words that give a command these settings; raises InputError for one that it does not have."""
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
            options += [word] if value else parameter.secondary_opts
        else:
            # One word, so that a value may begin with a dash.
            options += [f"{word}={item}" for item in values]
    if left:
        raise InputError(f"there is no setting {next(iter(left))!r}; see mmray {command} --help")
    return [command, *options, "--", *positions]


def command_line(template: str, places: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Return a call of a command with these settings, without those that are the default.

    `places` are settings that are not what they were, such as RUN from where this is asked. Where the settings are not
    those of the command, such as those of a pipeline's step, or there is no such command, it is the template.
    """
    name = template.split()[1]
    command = typer.main.get_command(app).commands.get(name)  # type: ignore[attr-defined]
    if command is None:
        return template
    parameters = {parameter.name: parameter for parameter in command.params}
    known = {**settings, **{place: value for place, value in places.items() if place in settings}}
    if any(parameter.required and known.get(word) is None for word, parameter in parameters.items()):
        return template
    own = {
        word: value
        for word, value in known.items()
        if word in parameters and word not in ONCE and (parameters[word].required or value != parameters[word].default)
    }
    words = words_of(name, own)
    end = words.index("--")
    return shlex.join(["mmray", name, *words[end + 1 :], *words[1:end]])
