"""The command line's help: every command in its group, every setting with its default, short enough to be read."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

import mmray.cli  # noqa: F401  registers the commands
from mmray.engine.settings import JobSettings
from mmray.features.alignment.settings import AlignmentSettings
from mmray.features.census.settings import CensusSettings
from mmray.features.properties.settings import PropertySettings
from mmray.features.select.settings import SelectionSettings
from mmray.terminal.help import GROUPS, first_sentence
from mmray.terminal.options import app
from tests.bench.writing import ROOT, between
from tests.support.command import Answer
from tests.support.option_details import COMMAND, ROOMS, details, table

Mmray = Callable[..., Answer]
COMMANDS = get_command(app).commands
WIDTH, OVERVIEW, LINES, SENTENCE = 100, 45, 60, 80
"""Columns that help is made for; most lines of all commands and of one; most characters of a command's sentence."""


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.mark.parametrize("command", COMMANDS)
def test_help(mmray: Mmray, command: str) -> None:
    answer = mmray(command, "--help")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"Usage: mmray {command}")
    lines = answer.out.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_in_a_sentence_what_it_does(mmray: Mmray, command: str) -> None:
    sentence = first_sentence(COMMANDS[command].help)
    assert len(sentence) <= SENTENCE
    assert f"{command} " in mmray("--help").out
    assert sentence in mmray("--help").out


@pytest.mark.parametrize("command", [name for name in COMMANDS if COMMANDS[name].epilog])
def test_examples_parse(mmray: Mmray, command: str) -> None:
    shown = mmray(command, "--help").out.split("Examples:\n")[1].splitlines()
    for line in shown:
        _, name, *words = shlex.split(line)
        assert name == command
        COMMANDS[command].make_context(name, words)  # raises for an option that does not exist


def test_the_overview_is_one_screen_in_groups(mmray: Mmray) -> None:
    text = mmray("--help").out
    assert len(text.splitlines()) <= OVERVIEW
    assert re.findall(r"^(\w+):$", text, re.MULTILINE)[1:] == list(GROUPS)


def test_help_without_arguments(mmray: Mmray) -> None:
    answer = mmray()
    assert answer.status == 2
    assert answer.err.count("mmray:") == 0
    assert all(command in answer.out + answer.err for command in COMMANDS)


@pytest.mark.parametrize("command", ["census", "plan"])
def test_help_has_every_setting_with_its_default(mmray: Mmray, command: str) -> None:
    text = " ".join(mmray(command, "--help").out.split())
    for name, field in CensusSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        _, found, rest = text.partition(f" {flag} ")
        assert found, flag
        entry = rest.split(" --")[0]
        assert first_sentence(field.description).replace("`", "") in entry
        if isinstance(field.default, bool) or (command, name) == ("plan", "out"):
            continue
        if field.is_required():
            assert "[required]" in entry, entry
        elif field.default is not None:
            assert f"[{field.default}]" in entry, entry


def test_defaults_are_shown_as_they_are_given(mmray: Mmray) -> None:
    text = " ".join(mmray("hallucination", "--help").out.split())
    assert "factors of the neurons' activations. [0.0, 0.5, 2.0, 3.0]" in text
    assert "--seed N Seed of everything drawn. [0]" in text
    # Nothing is the default of a list that may stay empty.
    assert "[]" not in text
    # A default that depends on others is in words.
    assert "Default: 50 for a swap" in " ".join(mmray("edit", "--help").out.split())


@pytest.mark.parametrize("readme", ROOMS)
def test_a_room_s_readme_has_what_help_is_too_short_for(readme: str) -> None:
    text = (ROOT / readme).read_text("utf-8")
    assert text == between(text, COMMAND, table(readme)), f"run {COMMAND}"


@pytest.mark.parametrize("settings", [AlignmentSettings, PropertySettings, SelectionSettings])
def test_rooms_without_such_a_table_need_none(settings: type[JobSettings]) -> None:
    assert list(details(settings)) == []


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("limit", "samples"),
        ("shard_size", "Samples per shard"),
        ("batch_size", "Samples per forward pass"),
        ("workers", "Actors"),
        ("gpus_per_worker", "GPUs per worker"),
        ("top_k", "Neurons"),
        ("candidates", "Neurons per concept"),
    ],
)
def test_every_number_has_its_unit(name: str, unit: str) -> None:
    assert unit in str(CensusSettings.model_fields[name].description)


def test_verbose_tells_where_an_error_was_raised(tmp_path) -> None:
    command = [sys.executable, "-m", "mmray", "-v", "status", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"mmray: {tmp_path}: no run here")


def reached_from(function: Any) -> set[str]:
    """Return the names that a command's function uses, and those that functions of its module use for it."""
    function = inspect.unwrap(function)
    module = ast.parse(inspect.getsource(inspect.getmodule(function)))
    defined = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    found, left = set[str](), [function.__name__]
    while left:
        node = defined[left.pop()]
        names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)} - found
        left += names & defined.keys()
        found |= names
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_which_is_useful_next(name):
    assert "say_next" in reached_from(COMMANDS[name].callback)
