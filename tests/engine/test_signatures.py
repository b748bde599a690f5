"""Functions that take settings say which: in their signature and in their documentation."""

import inspect
from typing import Any

import pytest
from pydantic import BaseModel

import mmray
from mmray.engine.settings import JobSettings
from mmray.engine.signatures import takes
from mmray.errors import InputError
from mmray.features.editing.settings import EditSettings

WITH_SETTINGS = (
    "align",
    "bias",
    "edit",
    "evaluate",
    "hallucination",
    "perturb",
    "properties",
    "run_census",
    "saliency",
    "select",
    "selectivity",
)


@pytest.mark.parametrize("name", WITH_SETTINGS)
def test_every_argument_has_a_default_or_must_be_given_and_is_documented(name):
    function = getattr(mmray, name)
    arguments = inspect.signature(function).parameters
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in arguments.values())
    assert all(one.annotation is not inspect.Parameter.empty for one in arguments.values())
    documented = inspect.getdoc(function).partition("Settings:")[2]
    for argument in arguments.values():
        if argument.kind is inspect.Parameter.KEYWORD_ONLY:
            assert f"\n    {argument}\n        " in documented, argument.name
    # Options of the command line mean nothing here.
    assert "--" not in documented


def test_every_setting_is_an_argument():
    assert set(inspect.signature(mmray.edit).parameters) == {"run", *EditSettings.model_fields}


def test_arguments_are_those_of_the_settings():
    class Few(JobSettings):
        depth: int
        """How deep to go; see --retry-failed."""
        given: str = "here"
        """Set by the function."""

    @takes(Few, "given")
    def go(run: str, **settings: Any) -> int:
        """Go."""
        return len(settings)

    arguments = inspect.signature(go).parameters
    assert list(arguments) == [
        "run",
        "depth",
        *(name for name in JobSettings.model_fields if name != "local"),
        "executor",
    ]
    assert arguments["depth"].default is inspect.Parameter.empty
    assert arguments["executor"].default == "ray"
    assert "depth: int\n        How deep to go; see retry_failed." in inspect.getdoc(go)
    # The function is the same: unknown arguments are refused by the settings, with a message of their own.
    assert go("here", anything=1) == 1


def test_a_function_without_documentation_gets_that_of_its_settings():
    class Bare(BaseModel):
        depth: int = 3

    @takes(Bare)
    def go(**settings: Any) -> None: ...

    assert "depth: int = 3" in go.__doc__


def test_errors_name_arguments_and_leave_commands_alone():
    class One(JobSettings):
        depth: int = 1
        """How deep."""

    @takes(One)
    def go(**settings: Any) -> None:
        """Go."""
        raise InputError("--text-count and --depth don't fit; run mmray go --depth 2 first, or drop --text-count")

    with pytest.raises(InputError) as caught:
        go()
    assert str(caught.value) == "text_count and depth don't fit; run mmray go --depth 2 first, or drop text_count"


def test_a_misspelt_argument_is_suggested():
    with pytest.raises(InputError, match=r"unknown setting 'limt'; did you mean 'limit'[?]"):
        mmray.census("demo", "demo", "unused", limt=3)
