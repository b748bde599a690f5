"""Every form of data, on disk and on S3, gives the samples that were written into it."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mmray.data.columns import Columns
from mmray.data.samples import Sample, digest_id
from mmray.data.shards import cut, read_shard
from mmray.data.sources import open_source
from tests.support.data_files import FORMS, Row, read_all, write_coco, write_jsonl, write_parquet, write_tar, write_tars

Upload = Callable[[Path], str]


@pytest.fixture(params=["local", "s3"])
def put(request: pytest.FixtureRequest) -> Upload:
    return str if request.param == "local" else request.getfixturevalue("upload")


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_those_written(form: str, tmp_path: Path, rows: list[Row], put: Upload) -> None:
    data = put(FORMS[form](tmp_path / "data", rows))
    read = read_all(data)
    assert len(read) == len(rows)
    for sample, row in zip(read, rows, strict=True):
        assert isinstance(sample, Sample), sample
        assert sample.image == row["image"]["bytes"]
        assert sample.caption == row["caption"]
        assert sample.objects == tuple(row["objects"])
        assert [pytest.approx(box, abs=1e-6) for box in row["boxes"]] == list(sample.boxes or ())
        if form != "coco":
            assert (sample.sample_id, sample.language, sample.domain) == (
                row["sample_id"],
                row["language"],
                row["domain"],
            )
            assert sample.questions == tuple((pair["question"], pair["answer"]) for pair in row["questions"])
    assert len({sample.source for sample in read}) == len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_range_is_the_slice_of_the_whole(form: str, tmp_path: Path, rows: list[Row], put: Upload) -> None:
    source = open_source(put(FORMS[form](tmp_path / "data", rows)))
    for file in source.files():
        whole = list(source.read(file.path, 0, file.rows + 5))
        assert len(whole) == file.rows
        for start in range(file.rows + 1):
            stop = min(file.rows, start + 3)
            assert list(source.read(file.path, start, stop)) == whole[start:stop]


@pytest.mark.parametrize("form", FORMS)
def test_shards_of_a_copied_source_are_the_whole_data(form: str, tmp_path: Path, rows: list[Row]) -> None:
    source = open_source(str(FORMS[form](tmp_path / "data", rows)))
    manifest = cut(source.files(), shard_size=4)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - as Ray carries a source to its actors
    read = [row for shard in manifest.shards for row in read_shard(copy, shard)]
    assert [row.caption for row in read if isinstance(row, Sample)] == [row["caption"] for row in rows]


@pytest.mark.parametrize("form", FORMS)
def test_digest_tells_changed_content_and_ignores_the_place(form: str, tmp_path: Path, rows: list[Row]) -> None:
    def digest(name: str) -> str:
        return cut(open_source(str(FORMS[form](tmp_path / name, rows))).files(), 4).digest

    first = digest("first")
    assert digest("second") == first
    rows[5]["caption"] += " And more."
    assert digest("third") != first


def test_a_changed_image_changes_the_digest_of_an_image_folder(tmp_path: Path, rows: list[Row]) -> None:
    write_jsonl(tmp_path, rows)
    before = open_source(str(tmp_path)).files()
    (tmp_path / "images/0003.jpg").write_bytes(b"smaller")
    after = open_source(str(tmp_path)).files()
    assert (before[0].path, before[0].rows) == (after[0].path, after[0].rows)
    assert before[0].digest != after[0].digest
    assert before[0].size > after[0].size


def test_samples_without_an_identifier_get_a_digest(tmp_path: Path, rows: list[Row]) -> None:
    bare = [{"image": row["image"]["bytes"], "text": row["caption"]} for row in rows]
    read = read_all(str(write_parquet(tmp_path, bare)))
    assert [row.sample_id for row in read] == [digest_id(row["image"], row["text"]) for row in bare]


def test_text_only_data(tmp_path: Path, rows: list[Row]) -> None:
    data = write_parquet(tmp_path, [{"text": row["caption"]} for row in rows])
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": row["caption"]}) for row in rows))
    write_tar(tmp_path / "text.tar", [(f"{number}.txt", row["caption"].encode()) for number, row in enumerate(rows)])
    for path in (data, tmp_path / "text.jsonl", tmp_path / "text.tar"):
        read = read_all(str(path))
        assert [(row.image, row.caption) for row in read if isinstance(row, Sample)] == [
            (None, row["caption"]) for row in rows
        ]


def test_extra_labels_and_classes(tmp_path: Path, rows: list[Row]) -> None:
    read = read_all(str(write_parquet(tmp_path, rows)), columns=Columns(labels=("background",), domain="none"))
    assert [row.labels for row in read if isinstance(row, Sample)] == [
        {"background": row["background"]} for row in rows
    ]
    assert {row.domain for row in read if isinstance(row, Sample)} == {None}


def test_captions_may_be_missing_when_the_model_writes_them(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path / "parquet", [{"image": row["image"]} for row in rows])
    write_coco(tmp_path / "coco", rows)
    for kind in ("parquet", "coco"):
        read = read_all(str(tmp_path / kind), captions=False)
        assert [(row.image, row.caption) for row in read if isinstance(row, Sample)] == [
            (row["image"]["bytes"], "") for row in rows
        ]


def test_several_captions_of_an_image(tmp_path: Path, rows: list[Row]) -> None:
    path = write_coco(tmp_path / "coco", rows)
    content = json.loads(path.read_text())
    content["annotations"].append({"id": 7, "image_id": 1, "caption": "One more."})
    path.write_text(json.dumps(content))
    read = read_all(str(path))
    assert len(read) == len(rows) + 1
    assert [row.caption for row in read[:2] if isinstance(row, Sample)] == [rows[0]["caption"], "One more."]
    assert [row.sample_id for row in read[:2]] == ["1-101", "1-7"]


def test_coco_folders(tmp_path: Path, rows: list[Row], put: Upload) -> None:
    write_coco(tmp_path / "coco", rows)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "coco/val2017").rename(elsewhere)
    captions = put(tmp_path / "coco/annotations/captions_val2017.json")
    read = read_all(f"{captions}:{put(elsewhere)}")
    assert [row.image for row in read if isinstance(row, Sample)] == [row["image"]["bytes"] for row in rows]
    elsewhere.rename(tmp_path / "coco/images")
    again = read_all(put(tmp_path / "coco"))
    assert [replace(row, source="") for row in again] == [replace(row, source="") for row in read]
    assert again[0].source == "annotations/captions_val2017.json#0"


def test_globs_and_braces_mean_the_same_everywhere(tmp_path: Path, rows: list[Row], put: Upload) -> None:
    write_tars(tmp_path / "tars", rows)
    write_parquet(tmp_path / "tars", rows, "other.parquet")
    root = put(tmp_path)
    for pattern in ("part-{000..001}.tar", "part-{000,001}.tar", "*.tar", "part-00[01].tar", "part-00?.tar"):
        source = open_source(f"{root}/tars/{pattern}")
        assert [file.path for file in source.files()] == ["part-000.tar", "part-001.tar"], pattern
    assert [file.path for file in open_source(f"{root}/**/part*.tar").files()] == [
        "tars/part-000.tar",
        "tars/part-001.tar",
    ]


def test_objects_and_translations(tmp_path: Path, rows: list[Row], put: Upload) -> None:
    names = tuple(sorted({name for row in rows for name in row["objects"]}))
    concepts = [{"concept": "tulip", "kind": "plant", "names": {"en": "tulip", "fr": "tulipe"}}]
    for form, write in FORMS.items():
        path = write(tmp_path / form, rows)
        folder = path if path.is_dir() else path.parent
        (folder / "concepts.json").write_text(json.dumps(concepts))
    root = put(tmp_path)
    for form in FORMS:
        source = open_source(f"{root}/{form}" + ("/annotations/captions_val2017.json" if form == "coco" else ""))
        assert source.objects_vocabulary() == names, form
        assert source.translations() == {"tulip": {"en": "tulip", "fr": "tulipe"}}, form
    without = open_source(f"{root}/parquet file", Columns(objects="none"))
    assert without.objects_vocabulary() == ()


def test_demo() -> None:
    source = open_source("demo")
    (file,) = source.files()
    assert file.rows == 1536
    read = list(source.read(file.path, 250, 262))
    assert all(isinstance(row, Sample) for row in read)
    assert [row.source for row in read] == [f"census.parquet#{row}" for row in range(250, 262)]
    assert {"tulip", "volcano"} <= set(source.objects_vocabulary()) == set(source.translations())


def test_order_of_files_is_that_of_their_paths(tmp_path: Path, rows: list[Row], put: Upload) -> None:
    for name in ("b/2", "a/10", "a/9", "_temporary/0", ".hidden/0"):
        write_parquet(tmp_path / "data" / name, rows[:1])
    paths = [file.path for file in open_source(put(tmp_path / "data")).files()]
    assert paths == ["a/10/data.parquet", "a/9/data.parquet", "b/2/data.parquet"]
    assert all(first < second for first, second in pairwise(paths))
