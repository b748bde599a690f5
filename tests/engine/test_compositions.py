"""Commands that are more than one job keep what the jobs do: they work from anywhere, and one driver is at work."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmray.cli import main
from mmray.errors import InputError
from mmray.features.editing.edit import open_edit
from mmray.features.pipeline.job import pipeline_settings, run_pipeline
from mmray.features.selectivity.driver import run_selectivity
from mmray.features.selectivity.settings import selectivity_settings
from mmray.runs.driver import drive_analysis
from mmray.runs.run import open_run
from tests.engine.jobs import SHARD, WISH, Place
from tests.engine.suite import Suite, elsewhere, without_links


def selectivity(place: Place) -> Any:
    sizes = {"by": "domain", "permutations": 2, "bootstraps": 0}
    return run_selectivity(selectivity_settings({"run": place.run, "local": True, **sizes}))


def edit(place: Place) -> Any:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in WISH.items()]
    out = place.root / "own"
    with pytest.raises(SystemExit) as ended:
        main(lambda: ["edit", *options, "--allow-collateral", f"--out={out}", place.run])
    if ended.value.code:
        raise InputError("refused")
    return open_edit(out)


def pipeline(place: Place) -> Any:
    census = {"model": "demo", "data": place.data, "out": str(place.root / "piped"), "shard_size": SHARD}
    asked = {"data": place.data, "limit": 4, "text_count": 0, "bleu": False, "draws": 10}
    settings = {"census": census, "edits": {"no-broccoli": WISH}, "evaluation": asked, "local": True}
    return run_pipeline(pipeline_settings(settings))


COMPOSITIONS: dict[str, tuple[Callable[[Place], Any], str]] = {
    "selectivity": (selectivity, "run/selectivity"),
    "edit": (edit, "own"),
    "pipeline": (pipeline, "piped/pipeline"),
}
"""Command → how it is run, and where its lease lies."""
each = pytest.mark.parametrize("name", COMPOSITIONS)


@pytest.mark.slow
@each
def test_it_works_from_anywhere_and_without_hard_links(suite: Suite, name: str) -> None:
    command, _ = COMPOSITIONS[name]
    place = suite.place()
    with elsewhere(suite.root / "elsewhere"), without_links():
        done = command(place)
    assert not getattr(done, "quarantined", {})


@each
def test_a_second_driver_is_refused(suite: Suite, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, lease = COMPOSITIONS[name]
    place = suite.place()
    uri = f"{place.root}/{lease}"
    with drive_analysis(uri), pytest.raises(InputError) as refusal:
        command(place)
    said = capsys.readouterr().err if name == "edit" else str(refusal.value)
    assert f"{uri}: another driver is at work on this run (process {os.getpid()} on " in said


def test_a_run_is_opened_with_the_data_of_its_home(suite: Suite) -> None:
    with elsewhere(suite.root / "elsewhere"):
        data = open_run(suite.base.run).info["settings"]["data"]
    assert Path(data) == Path(suite.base.data)
