"""Relative paths of a run's settings are those of where it was begun."""

from pathlib import Path

import pytest

from mmray.neurons.concepts import NAMED
from mmray.runs.home import resolve_data, resolve_path, resolve_settings


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("demo", "demo"),
        ("data/d.parquet", "{home}/data/d.parquet"),
        ("./data/*.parquet", "{home}/data/*.parquet"),
        ("/data/d.parquet", "/data/d.parquet"),
        ("~/d.parquet", "~/d.parquet"),
        ("s3://bucket/d.parquet", "s3://bucket/d.parquet"),
        ("s3://bucket/captions_val.json:images", "s3://bucket/captions_val.json:{home}/images"),
        ("captions_val.json:images", "{home}/captions_val.json:{home}/images"),
        ("captions_val.json:s3://bucket/images", "{home}/captions_val.json:s3://bucket/images"),
        ("hf:there", "hf:{home}/there"),
        ("hf:there:val", "hf:{home}/there:val"),
        ("hf:org/name:val", "hf:org/name:val"),
    ],
)
def test_data_is_found_from_anywhere(tmp_path: Path, data: str, found: str) -> None:
    (tmp_path / "there").mkdir()
    assert resolve_data(data, str(tmp_path)) == found.format(home=tmp_path)


def test_a_home_on_another_machine_changes_nothing() -> None:
    assert resolve_path("data/d.parquet", "/no/such/home") == "data/d.parquet"


@pytest.mark.parametrize(("nouns", "found"), [*((name, name) for name in NAMED), ("n.tsv", "{home}/n.tsv")])
def test_settings_of_a_run(tmp_path: Path, nouns: str, found: str) -> None:
    (tmp_path / "models" / "llava").mkdir(parents=True)
    settings = {"data": "d.parquet", "nouns": nouns, "limit": 3, "model": "models/llava"}
    assert resolve_settings(settings, str(tmp_path)) == {
        "data": f"{tmp_path}/d.parquet",
        "nouns": found.format(home=tmp_path),
        "limit": 3,
        "model": f"{tmp_path}/models/llava",
    }


@pytest.mark.parametrize("model", ["demo", "somebody/llava", "/models/llava"])
def test_a_model_that_is_no_folder_of_home_stays_as_it_is(tmp_path: Path, model: str) -> None:
    assert resolve_settings({"data": "demo", "model": model}, str(tmp_path))["model"] == model
