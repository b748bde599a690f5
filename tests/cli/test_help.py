"""The command line's help: every command and setting, with defaults and units."""

import re
from collections.abc import Callable

import pytest

from mmray.features.census.settings import CensusSettings
from tests.support.command import Answer

Mmray = Callable[..., Answer]
COMMANDS = (
    "align",
    "hallucination",
    "perturb",
    "census",
    "plan",
    "status",
    "rank",
    "select",
    "neuron",
    "check-model",
    "demo",
    "diff",
    "refresh",
    "edit",
    "apply",
    "evaluate",
    "pipeline",
    "properties",
    "report",
    "selectivity",
)


def plain(help_text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", help_text).split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help(mmray: Mmray, command: str) -> None:
    answer = mmray(command, "--help")
    assert (answer.status, answer.err) == (0, "")
    assert f"Usage: mmray {command}" in answer.out


def test_help_without_arguments(mmray: Mmray) -> None:
    answer = mmray()
    assert answer.status == 2
    assert answer.err.count("mmray:") == 0
    assert all(command in answer.out + answer.err for command in COMMANDS)


@pytest.mark.parametrize("command", ["census", "plan"])
def test_help_has_every_setting_with_its_default(mmray: Mmray, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = plain(mmray(command, "--help").out)
    for name, field in CensusSettings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        _, found, rest = text.partition(f" {flag} ")
        assert found, flag
        entry = rest.split(" --")[0]
        if isinstance(field.default, bool) or (command, name) == ("plan", "out"):
            continue
        if field.is_required():
            assert "[required]" in entry, entry
        elif field.default is None:
            assert "default" in entry.lower(), entry
        else:
            assert f"[default: {field.default}]" in entry, entry


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
