"""A run's folder is a data set: its card names every table, and nothing of the machine that made it."""

import json

import datasets
import pytest
import yaml

from mmray.features import table_schemas
from mmray.runs.card import CARD, MADE, card, write_card
from mmray.storage import open_store


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def store(run, tmp_path):
    """A copy of what a card is made from."""
    copy, source = open_store(str(tmp_path / "run")), open_store(run.uri)
    for entry in [*source.list("snapshots/"), *source.list("tables/"), *source.list("run.json")]:
        copy.put(entry.key, source.read(entry.key))
    return copy


def test_each_table_is_read_by_its_name(run, tmp_path):
    names = [one["config_name"] for one in front(open_store(run.uri).read(CARD).decode())["configs"]]
    assert names == [name for name in run.tables if len(run.table(name))]
    for name in names:
        found = datasets.load_dataset(run.uri, name, cache_dir=str(tmp_path), split="train")
        assert len(found) == len(run.table(name))
        assert found.column_names == run.table(name).column_names


def test_rankings_are_read_if_no_table_is_named(run, tmp_path):
    found = datasets.load_dataset(run.uri, cache_dir=str(tmp_path), split="train")
    assert len(found) == len(run.table("rankings"))


def test_columns_have_their_units(run):
    text = open_store(run.uri).read(CARD).decode()
    for name in run.tables:
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"\n{len(run.table(name)):,} rows" in section
        for column in table_schemas()[name]:
            unit = (column.metadata or {}).get(b"unit", b"").decode().replace("|", "/")
            assert f"| {column.name} | {column.type} | {unit} |" in section


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/someone/models/llava", "llava"),
        ("../models/llava", "llava"),
        ("data/of/someone/coco.json", "coco.json"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
        ("s3://bucket/coco", "s3://bucket/coco"),
        ("hf://user:secret@datasets/coco", "hf://…@datasets/coco"),
    ],
)
def test_no_path_and_no_password_is_told(store, place, name):
    info = json.loads(store.read("run.json"))
    info["settings"] |= {"model": place, "data": place, "nouns": "/home/someone/lexicon.json"}
    text = card(store, info)
    assert front(text)["pretty_name"] == f"Neurons of {name}"
    assert "someone" not in text
    assert "secret" not in text
    assert info["home"] not in text


def test_a_card_of_somebody_else_stays(store):
    store.put(CARD, b"# Mine")
    write_card(store)
    assert store.read(CARD) == b"# Mine"
    store.put(CARD, f"---\n---\n{MADE}\nold".encode())
    write_card(store)
    assert b"# Neurons of " in store.read(CARD)


def test_a_table_of_several_files_is_one_configuration(store):
    data = store.read("tables/rankings.parquet")
    store.delete("tables/rankings.parquet")
    for number in range(2):
        store.put(f"tables/rankings.parquet/{number:05d}.parquet", data)
    write_card(store)
    files = {one["config_name"]: one["data_files"] for one in front(store.read(CARD).decode())["configs"]}
    assert files["rankings"] == "tables/rankings.parquet/*"
    assert files["captions"] == "tables/captions.parquet"
