"""What can't be opened is told in one line that names it and says how to fix it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import EndpointConnectionError

from mmray import storage
from mmray.data.sources import open_source
from mmray.errors import InputError, StorageError
from tests.support.data_files import (
    Row,
    members,
    write_coco,
    write_csv,
    write_jsonl,
    write_parquet,
    write_parts,
    write_tar,
    write_tars,
)


def broken_parquet(folder: Path, rows: list[Row]) -> None:
    path = write_parquet(folder, rows)
    path.write_bytes(path.read_bytes()[:3000])


def two_kinds(folder: Path, rows: list[Row]) -> None:
    write_parts(folder, rows)
    write_tars(folder, rows)


def two_metadata_files(folder: Path, rows: list[Row]) -> None:
    write_jsonl(folder, rows)
    write_csv(folder, rows)


def images_alone(folder: Path, rows: list[Row]) -> None:
    write_jsonl(folder, rows).unlink()


def compressed_tar(folder: Path, rows: list[Row]) -> None:
    write_tar(folder / "part.tar", members(rows)).rename(folder / "part.tar.gz")


def empty_tar(folder: Path, rows: list[Row]) -> None:
    (folder / "part.tar").write_bytes(b"")


def coco_without_images(folder: Path, rows: list[Row]) -> None:
    write_coco(folder, rows)
    for image in (folder / "val2017").iterdir():
        image.unlink()


def coco_that_is_not(folder: Path, rows: list[Row]) -> None:
    (folder / "captions_val.json").write_text('{"images": 3}')


def coco_cut_short(folder: Path, rows: list[Row]) -> None:
    path = write_coco(folder, rows)
    path.write_text(path.read_text()[:100])


def coco_of_another_split(folder: Path, rows: list[Row]) -> None:
    path = write_coco(folder, rows)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["image_id"] += 1000
    path.write_text(json.dumps(content))


def coco_objects(folder: Path, rows: list[Row]) -> None:
    write_coco(folder, rows)
    shutil.copy(folder / "annotations/instances_val2017.json", folder / "annotations/captions_val2017.json")


def coco_without_annotations(folder: Path, rows: list[Row]) -> None:
    path = write_coco(folder, rows)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))


def empty_metadata(folder: Path, rows: list[Row]) -> None:
    write_jsonl(folder, rows).write_text("\nbroken\n")


BAD: dict[str, tuple[Callable[[Path, list[Row]], object], str]] = {
    "empty": (lambda folder, rows: (folder / "_SUCCESS").write_text(""), "(no files there|no such file or folder)"),
    "unknown": (lambda folder, rows: (folder / "notes.txt").write_text("x"), "nothing recognised .* Parquet files"),
    "broken parquet": (broken_parquet, r"data\.parquet: unreadable Parquet .*; write or copy it again"),
    "two kinds": (two_kinds, r"holds parquet and webdataset data; name one"),
    "two metadata files": (two_metadata_files, r"both metadata\.jsonl and metadata\.csv; name the one"),
    "images alone": (images_alone, r"images without captions; add a metadata\.jsonl"),
    "compressed tar": (compressed_tar, "compressed tars .*; decompress"),
    "empty tar": (empty_tar, "no samples in these tars, or damaged"),
    "coco without images": (coco_without_images, r"images are not next to it; write .*captions_val2017\.json:IMAGES"),
    "coco that is not": (coco_that_is_not, "captions_val.json: not COCO JSON"),
    "coco cut short": (coco_cut_short, r"captions_val2017\.json: not JSON"),
    "coco of another split": (
        coco_of_another_split,
        r"captions_val2017\.json: none of its annotations is of one of its images; take captions and images of one",
    ),
    "coco objects": (
        coco_objects,
        r"captions_val2017\.json: annotations of objects, without captions; name the captions",
    ),
    "coco without annotations": (
        coco_without_annotations,
        r"captions_val2017\.json: no annotations; name the captions",
    ),
    "captions that are numbers": (
        lambda folder, rows: write_parquet(folder, [row | {"caption": 7} for row in rows]),
        r"no caption column: .*, but 'caption' holds number, not text or texts; name it: --caption-column NAME",
    ),
    "images that are numbers": (
        lambda folder, rows: write_parquet(folder, [row | {"image": 7} for row in rows]),
        r"no image column: .*, but 'image' holds number, not image or bytes or text; name it: --image-column NAME",
    ),
    "empty metadata": (empty_metadata, "no row of the metadata can be read"),
    "no captions": (
        lambda folder, rows: write_parquet(folder, [{"image": row["image"]} for row in rows]),
        r"no caption column: .*data\.parquet has the columns image; name it: --caption-column NAME",
    ),
}


@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.parametrize("case", BAD)
def test_bad_data(case: str, where: str, tmp_path: Path, rows: list[Row], request: pytest.FixtureRequest) -> None:
    make, message = BAD[case]
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder, rows)
    data = str(folder) if where == "local" else request.getfixturevalue("upload")(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_source(data)
    assert "\n" not in str(caught.value)
    assert data in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "DATA is empty"),
        ("nowhere/at/all", "nowhere/at/all: no such file or folder"),
        ("nowhere/*.parquet", r"no file matches nowhere/\*\.parquet"),
        ("nowhere/part-{000..003}.tar", r"no file matches nowhere/part-000\.tar"),
        ("captions.json:nowhere", "captions.json: no such file"),
        ("gs://bucket/data", "scheme 'gs' is not supported"),
        ("s3://", "no bucket"),
        ("hf:", "no name"),
    ],
)
def test_bad_names(data: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_source(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["s3://no-such-bucket/data", "s3://no-such-bucket", "s3://no-such-bucket/*.tar"])
def test_a_bucket_that_is_not_there(data: str, bucket: str) -> None:
    with pytest.raises(InputError, match=r"NoSuchBucket.*create the bucket"):
        open_source(data)


@pytest.mark.parametrize("write", [write_parquet, write_tars, write_jsonl])
def test_an_outage_is_an_error_and_not_failed_rows(
    write: Callable[[Path, list[Row]], Path],
    tmp_path: Path,
    rows: list[Row],
    upload: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = open_source(upload(write(tmp_path / "data", rows)))
    path = source.files()[0].path
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    client = boto3.client("s3", config=Config(retries={"total_max_attempts": 1}))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage.s3, "s3_client", lambda: client)
    monkeypatch.setattr(storage.s3_access, "s3_client", lambda: client)
    with pytest.raises((OSError, EndpointConnectionError, StorageError), match="onnect"):
        list(source.read(path, 0, 9))


def test_a_missing_member_of_a_brace_pattern(tmp_path: Path, rows: list[Row]) -> None:
    write_tars(tmp_path, rows)
    with pytest.raises(InputError, match=r"no file matches .*part-002\.tar"):
        open_source(f"{tmp_path}/part-{{000..003}}.tar")


def test_a_damaged_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "garbage.parquet").write_bytes(b"garbage" * 100)
    for data in (tmp_path, tmp_path / "garbage.parquet", tmp_path / "*.parquet"):
        with pytest.raises(InputError, match=r"garbage\.parquet: unreadable Parquet") as refusal:
            open_source(str(data))
        assert str(refusal.value).count("garbage.parquet") == 1


def test_links_to_nothing_and_names_with_special_characters(tmp_path: Path, rows: list[Row]) -> None:
    path = write_parquet(tmp_path, rows, "odd [1] {a,b}.parquet")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    assert [file.rows for file in open_source(str(path)).files()] == [9]
    assert [file.path for file in open_source(str(tmp_path)).files()] == [path.name]


def test_a_translation_file_of_another_form(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path, rows)
    for content in ("{broken", '{"dog": "chien"}', '[{"concept": "dog"}]', "3"):
        (tmp_path / "concepts.json").write_text(content)
        with pytest.raises(InputError, match=r"concepts\.json: not of the form"):
            open_source(str(tmp_path)).translations()


@pytest.mark.usefixtures("ordinary_user")
def test_a_file_that_may_not_be_read(tmp_path: Path, rows: list[Row]) -> None:
    write_tars(tmp_path, rows)
    (tmp_path / "part-000.tar").chmod(0)
    with pytest.raises(InputError, match=r"part-000\.tar: can't be read"):
        open_source(str(tmp_path))


def test_recursion_bombs(tmp_path: Path, rows: list[Row]) -> None:
    path = write_jsonl(tmp_path, rows)
    path.write_text("[" * 100_000 + "\n" + path.read_text())
    assert open_source(str(path)).files()[0].rows == 10
    (tmp_path / "captions_x.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        open_source(str(tmp_path / "captions_x.json"))
