"""What `check-model` says works with a model, beyond what its checks prove."""

import json

import pytest
from typer.testing import CliRunner

from mmray.cli import app
from mmray.features.census.model_check import ABILITIES, abilities_of
from mmray.models.loading import load


def problems(model):
    return {one.name: one.problem for one in abilities_of(model) if one.problem}


def test_everything_works_with_a_llava(open_model):
    assert problems(open_model("llava")) == {}
    assert len(abilities_of(open_model("llava"))) == len(ABILITIES)


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("blip2_opt", {"heat maps, saliency"}),
        ("qwen3_vl_moe", {"selectivity --steer"}),
        ("paligemma", {"neurons of the projector"}),
    ],
)
def test_what_does_not_work_is_told_with_the_reason(open_model, variant, missing):
    found = problems(open_model(variant))
    assert missing <= found.keys()
    assert not any("\n" in problem for problem in found.values())


def test_everything_works_with_a_probed_model_too(tiny, monkeypatch):
    monkeypatch.setattr("mmray.models.parts.FAMILIES", {})
    model = load(str(tiny("llava")))
    assert model.parts.family == "probed"
    assert problems(model) == {}


def test_the_command_lists_them(tiny):
    told = CliRunner().invoke(app, ["check-model", str(tiny("blip2_opt"))], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    assert "– heat maps, saliency  the image has no grid of tokens in the sequence" in told.output
    assert "works: " in told.output
    listed = CliRunner().invoke(app, ["check-model", str(tiny("blip2_opt")), "--json"])
    rows = json.loads(listed.stdout)["abilities"]
    assert [row["name"] for row in rows] == list(ABILITIES)
