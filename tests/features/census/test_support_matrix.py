"""Every type with a tiny checkpoint is proven, by `check-model --all` too, and the models' README says so."""

import json
import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from typer.testing import CliRunner

from mmray.cli import app
from mmray.errors import InputError
from mmray.features.census import support_matrix
from mmray.features.census.support_matrix import (
    COMMAND,
    image_row,
    others,
    prove,
    section,
    tables,
    text_row,
    written,
)
from mmray.models.tiny.catalogue import CATALOGUE, WITHOUT, TinyType, untried
from tests.bench.writing import ROOT

SAMPLE = ("blip-2 with t5", "florence2", "gemma3n", "gemma4", "glm4v_moe", "gpt_oss", "idefics", "kosmos-2", "qwen3_5")
"""Types that differ most from one another; the others are among the slow tests."""
README = ROOT / "mmray/models/README.md"


@pytest.fixture(scope="module")
def page():
    return README.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in CATALOGUE]
)
def test_every_type_is_proven_and_has_its_line(name, page):
    if library := CATALOGUE[name].lacks:
        pytest.skip(f"{library} is not installed")
    found = prove(name)
    assert found.passed, (found.problem, [check for check in found.checks if not check.passed])
    assert found.checks
    assert (found.image == "none") == (not CATALOGUE[name].reads_images)
    table, row = ("texts", text_row(found)) if found.image == "none" else ("types", image_row(found))
    assert row in section(page, table)[0].splitlines(), f"run: {COMMAND}"


@pytest.mark.parametrize(("table", "images"), [("types", True), ("texts", False)])
def test_the_readme_has_a_line_for_each_and_no_more(page, table, images):
    lines = section(page, table)[0].splitlines()[2:]
    assert [re.match(r"\| `([^`]+)`", line)[1] for line in lines] == [
        name for name, tiny in CATALOGUE.items() if tiny.reads_images == images
    ]


def test_types_without_a_checkpoint_have_a_line(page):
    assert section(page, "others")[0] == others(), f"run: {COMMAND}"
    proven = {tiny.model_type for tiny in CATALOGUE.values()}
    # What is of another version of transformers has no line.
    assert not proven & WITHOUT.keys()
    mapped = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert len(proven & mapped) >= 60
    assert mapped == (proven & mapped) | (WITHOUT.keys() & mapped) | {*untried()}


def test_compositions_of_one_type_have_names_of_their_own():
    assert {"blip-2 with opt", "blip-2 with t5"} <= CATALOGUE.keys()
    assert CATALOGUE["blip-2 with t5"].model_type == CATALOGUE["blip-2 with opt"].model_type == "blip-2"


def run(monkeypatch, names, *asked):
    """Run the command with these types alone; what proves them knows all."""
    monkeypatch.setattr("mmray.models.tiny.catalogue.CATALOGUE", names)
    return CliRunner().invoke(app, ["check-model", "--all", *asked])


def here(monkeypatch):
    """Prove in this process: workers of their own import torch first."""
    monkeypatch.setattr(support_matrix, "prove_all", lambda names, dtype: (prove(name, dtype) for name in names))


@pytest.fixture
def lacking():
    return TinyType("llava", True, lambda folder: folder, needs="a_library_that_nobody_has")


@pytest.mark.slow  # workers import torch
def test_the_command_proves_all_and_writes_the_tables(monkeypatch, tmp_path, page, lacking):
    some = {name: CATALOGUE[name] for name in ("llama", "llava")}
    told = run(monkeypatch, some | {"odd": lacking})
    assert told.exit_code == 0, told.output
    assert re.search(r"✓ llama +table +gated +none +5 of 5\n", told.output)
    assert re.search(r"✓ llava +table +gated +tokens +6 of 6\n", told.output)
    assert "odd: not tried: a_library_that_nobody_has is not installed" in told.output
    assert "1 types that take images and 1 text-only ones passed; 0 did not" in told.output
    here(monkeypatch)
    (tmp_path / "page.md").write_text(page)
    assert run(monkeypatch, some, "--write", str(tmp_path / "page.md")).exit_code == 0
    lines = section((tmp_path / "page.md").read_text(), "types")[0].splitlines()
    assert len(lines) == 3
    assert lines[2] in section(page, "types")[0]


def test_the_command_fails_for_a_type_that_is_not_proven(monkeypatch):
    here(monkeypatch)
    told = run(monkeypatch, {"no_such_type": CATALOGUE["llava"]}, "--json")
    assert isinstance(told.exception, InputError)
    assert "not proven: no_such_type" in str(told.exception)
    (row,) = json.loads(told.stdout)["types"]
    assert row["passed"] is False
    assert "no_such_type" in row["problem"]


def test_a_page_that_would_lose_types_is_not_written(monkeypatch, tmp_path, page, lacking):
    (tmp_path / "page.md").write_text(page)
    told = run(monkeypatch, {"odd": lacking}, "--write", str(tmp_path / "page.md"))
    assert "install it" in str(told.exception)
    assert (tmp_path / "page.md").read_text() == page


@pytest.mark.parametrize("asked", [(), ("demo", "--all"), ("demo", "--write", "page.md")])
def test_a_model_or_all_of_them(asked):
    refused = CliRunner().invoke(app, ["check-model", *asked]).exception
    assert isinstance(refused, InputError)
    assert "--all" in str(refused)


def test_tables_go_between_their_markers(page):
    assert written(page, {"others": others()}) == page
    with pytest.raises(InputError, match="put them where it belongs"):
        written("", tables([]))


def test_a_page_without_markers_is_refused_before_the_work(tmp_path):
    (tmp_path / "page.md").write_text("no markers")
    assert "no <!-- types" in refusal_of(tmp_path / "page.md")
    assert "no page to write tables into" in refusal_of(tmp_path / "none.md")


def refusal_of(page):
    return str(CliRunner().invoke(app, ["check-model", "--all", "--write", str(page)]).exception)
