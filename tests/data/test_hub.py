"""`hf:` data from local folders: saved data sets, Parquet files, image folders; no network."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mmray.data import hub
from mmray.data.columns import Columns
from mmray.data.samples import Sample
from mmray.data.sources import open_source
from mmray.errors import InputError
from tests.support.data_files import Row, failures, read_all, table, write_jsonl, write_parquet

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_a_folder_of_parquet_files(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path / "set", rows[:5], "train.parquet")
    write_parquet(tmp_path / "set", rows[5:], "test.parquet")
    read = read_all(f"hf:{tmp_path / 'set'}")
    assert [row.image for row in read if isinstance(row, Sample)] == [row["image"]["bytes"] for row in rows[:5]]
    source = open_source(f"hf:{tmp_path / 'set'}:test")
    (file,) = source.files()
    assert (file.path, file.rows) == ("test", 4)
    whole = list(source.read("test", 0, 9))
    assert [row.sample_id for row in whole] == [row["sample_id"] for row in rows[5:]]
    assert list(source.read("test", 1, 3)) == whole[1:3]
    assert source.objects_vocabulary() == tuple(sorted({name for row in rows[5:] for name in row["objects"]}))
    assert open_source(f"hf:{tmp_path / 'set'}:test[:2]").files()[0].rows == 2


def test_an_image_folder(tmp_path: Path, rows: list[Row]) -> None:
    write_jsonl(tmp_path / "set", rows)
    read = read_all(f"hf:{tmp_path / 'set'}")
    assert [row.image for row in read if isinstance(row, Sample)] == [row["image"]["bytes"] for row in rows]
    (tmp_path / "set/concepts.json").write_text('[{"concept": "dog", "names": {"fr": "chien"}}]')
    assert open_source(f"hf:{tmp_path / 'set'}").translations() == {"dog": {"fr": "chien"}}


def test_paths_that_leave_the_folder(tmp_path: Path, rows: list[Row]) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/inside").write_bytes(b"inside")
    for row, path in zip(rows, (tmp_path / "secret", "../secret", tmp_path / "set/inside", "inside"), strict=False):
        row["image"] = {"bytes": None, "path": str(path)}
    write_parquet(tmp_path / "set", rows, "train.parquet")
    read = read_all(f"hf:{tmp_path / 'set'}")
    assert list(failures(read)) == [0, 1]
    assert all("leaves the data's folder" in message for message in failures(read).values())
    assert [row.image for row in read[2:4] if isinstance(row, Sample)] == [b"inside"] * 2


def test_a_saved_set_with_classes(tmp_path: Path, rows: list[Row]) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "caption": datasets.Value("string"),
            "mood": datasets.ClassLabel(names=["calm", "merry"]),
        }
    )
    content = {
        "image": [row["image"] for row in rows[:3]],
        "caption": ["One.", "Two.", "Three."],
        "mood": [1, 0, -1],
    }
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "set")
    read = read_all(f"hf:{tmp_path / 'set'}", columns=Columns(domain="mood"))
    assert [row.domain for row in read if isinstance(row, Sample)] == ["merry", "calm", None]


def test_a_saved_set_of_splits(tmp_path: Path, rows: list[Row]) -> None:
    one = datasets.Dataset(table(rows))
    datasets.DatasetDict({"validation": one, "test": one}).save_to_disk(tmp_path / "set")
    assert len(read_all(f"hf:{tmp_path / 'set'}:test")) == len(rows)
    with pytest.raises(InputError, match=r"which split\? Write .*:SPLIT, one of validation, test"):
        open_source(f"hf:{tmp_path / 'set'}")
    with pytest.raises(InputError, match="nosuch"):
        open_source(f"hf:{tmp_path / 'set'}:nosuch")


def test_the_digest_is_the_same_when_opened_again(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path / "set", rows, "train.parquet")
    first = open_source(f"hf:{tmp_path / 'set'}").files()
    hub.load.cache_clear()
    assert open_source(f"hf:{tmp_path / 'set'}").files() == first


def test_a_set_that_is_nowhere() -> None:
    with pytest.raises(InputError, match=r"hf:no-such/set: .*; check name, split and network") as caught:
        open_source("hf:no-such/set")
    assert "\n" not in str(caught.value)


CARDS = {
    "another folder": 'data_files: "/etc/*.conf"',
    "above": "data_files:\n  - split: train\n    path:\n    - ../outside/*.parquet",
    "the network": "data_files:\n    train: http://127.0.0.1:9/x.parquet",
    "another set": "data_files: hf://datasets/other/set/x.parquet",
    "in an archive": "data_files: zip://x.parquet::http://127.0.0.1:9/x.zip",
    "a folder": "data_dir: ../outside",
    "home": "data_files: ~/x.parquet",
}


@pytest.mark.parametrize("where", CARDS)
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_cards_that_name_files_elsewhere(
    tmp_path: Path, rows: list[Row], where: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: pytest.fail("opened"))
    write_parquet(tmp_path / "set", rows)
    mark = "---\n" if file == "README.md" else ""
    (tmp_path / "set" / file).write_text(f"{mark}configs:\n- config_name: default\n  {CARDS[where]}\n{mark}")
    with pytest.raises(InputError, match=r"names '.*' as a file, which is not its own") as refusal:
        open_source(f"hf:{tmp_path / 'set'}")
    assert "\n" not in str(refusal.value)


def test_a_card_of_the_hub_that_names_files_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "card").write_text(f"---\nconfigs:\n- config_name: default\n  {CARDS['the network']}\n---\n")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "card"))
    with pytest.raises(InputError, match=r"hf:some/set: names 'http://127.* which is not its own"):
        open_source("hf:some/set")


def test_a_card_that_names_its_own_files(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path / "set/parts", rows[:3])
    write_parquet(tmp_path / "set/more", rows[3:])
    named = "data_files:\n  - split: train\n    path: parts/*.parquet"
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {named}\n---\nWords.\n")
    assert len(read_all(f"hf:{tmp_path / 'set'}")) == 3


@pytest.mark.parametrize("link", ["data/train.parquet", "data"])
def test_links_out_of_a_folder(tmp_path: Path, rows: list[Row], link: str) -> None:
    write_parquet(tmp_path / "outside/data", rows, "train.parquet")
    (tmp_path / "set" / link).parent.mkdir(parents=True)
    (tmp_path / "set" / link).symlink_to(tmp_path / "outside" / link)
    with pytest.raises(InputError, match=f"{link} is a link out of it"):
        open_source(f"hf:{tmp_path / 'set'}")


def test_links_of_images_out_of_a_folder(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path / "set", [{"image": {"bytes": None, "path": "link"}, "caption": "A dog."}], "train.parquet")
    source = open_source(f"hf:{tmp_path / 'set'}")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "set/link").symlink_to(tmp_path / "secret")
    (row,) = source.read("train", 0, 1)
    assert not isinstance(row, Sample) and "leaves the data's folder" in row.message


def test_a_saved_set_that_names_files_elsewhere(tmp_path: Path, rows: list[Row]) -> None:
    content = [{"image": row["image"], "caption": row["caption"]} for row in rows]
    saved = datasets.Dataset.from_list(content, split="train")
    saved.save_to_disk(tmp_path / "outside")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "set")
    assert len(read_all(f"hf:{tmp_path / 'set'}")) == len(rows)
    state = tmp_path / "set/train/state.json"
    (name,) = (path.name for path in (tmp_path / "outside").glob("*.arrow"))
    state.write_text(state.read_text().replace(name, f"../../outside/{name}"))
    with pytest.raises(InputError, match=r"names '\.\./\.\./outside/.*' as a file, which is not its own"):
        open_source(f"hf:{tmp_path / 'set'}")
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["../outside"]}')
    with pytest.raises(InputError, match=r"names '\.\./outside' as a file"):
        open_source(f"hf:{tmp_path / 'set'}")
