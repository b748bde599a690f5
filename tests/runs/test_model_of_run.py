"""A run's model is the folder that it was made with, from wherever a later command runs."""

import json
import shutil

import pytest
import safetensors.torch

from mmray.errors import InputError
from mmray.models import loading
from mmray.runs.home import resolve_settings
from mmray.runs.run import open_run
from tests.support.local_jobs import census_here

FEW = {"limit": 2, "shard_size": 2, "nouns": "textblob"}


@pytest.fixture
def no_hub(monkeypatch):
    """Fail where a name is looked up on the hub."""
    import huggingface_hub

    def refuse(name, **_):
        raise AssertionError(f"{name} was looked up on the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, no_hub):
    """A run whose model was named by a relative path that looks like a hub id."""
    shutil.copytree(tiny("llava"), tmp_path / "models" / "llava")
    monkeypatch.chdir(tmp_path)
    census_here("models/llava", "demo", "run", **FEW)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return open_run(tmp_path / "run")


def test_a_run_records_what_its_model_is(run, tmp_path):
    assert run.info["model"]["kind"] == "folder"
    assert run.info["settings"]["model"] == str(tmp_path / "models" / "llava")
    assert loading.kind_of("demo") == "demo"
    assert loading.kind_of("models/llava") == "hub"


def test_a_run_of_an_earlier_version_finds_its_folder(run, tmp_path):
    settings = resolve_settings(run.info["settings"] | {"model": "models/llava"}, run.info["home"])
    assert loading.resolve(settings["model"]) == tmp_path / "models" / "llava"


def test_a_folder_that_is_gone_is_not_looked_up_on_the_hub(run, tmp_path):
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(InputError, match="no such model folder"):
        loading.resolve(resolve_settings(run.info["settings"], run.info["home"])["model"])


def test_a_census_names_the_weights_that_are_missing(tiny, tmp_path):
    folder = shutil.copytree(tiny("llava"), tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
    del weights[name]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing from the checkpoint \(1: .*down_proj"):
        census_here(folder, "demo", tmp_path / "run", **FEW)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["model"]["kind"] == "folder"
