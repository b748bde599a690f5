"""A bad row is a `Failure` in its place, with its identifier where that is known; its neighbours are untouched."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmray.data import locations
from mmray.data import rows as reading
from mmray.data.columns import Columns
from mmray.data.rows import object_names, samples
from mmray.data.samples import Failure, Sample
from mmray.data.sources import open_source
from tests.support.data_files import (
    Row,
    failures,
    members,
    read_all,
    write_coco,
    write_csv,
    write_jsonl,
    write_parquet,
    write_parts,
    write_tar,
)

EVERYTHING = Columns(
    image="image",
    caption="caption",
    sample_id="id",
    language="language",
    domain="domain",
    objects="objects",
    boxes="boxes",
    questions="questions",
    labels=("label",),
)
GOOD = {"image": b"image", "caption": "A dog.", "id": "s1"}


def no_images(names: list[str]) -> list[bytes | str]:
    return [f"no image {name!r}" for name in names]


def one(record: Any) -> Sample | Failure:
    (row,) = samples([("here#0", record)], EVERYTHING, True, no_images)
    assert row.source == "here#0"
    return row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "no caption"),
        ({"caption": " \n"}, "no caption"),
        ({"caption": 7}, "int where text"),
        ({"caption": ["", None]}, "no caption"),
        ({"caption": ["", 7]}, "int where text"),
        ({"caption": []}, "no caption"),
        ({"caption": "half \ud800 a pair"}, "not valid Unicode"),
        ({"image": None}, "no image in column"),
        ({"image": b""}, "no image in column"),
        ({"image": {"bytes": None, "path": None}}, "no image in column"),
        ({"image": {"bytes": None, "path": "x.png"}}, "no image 'x.png'"),
        ({"image": [1, 2]}, "holds list, not an image"),
        ({"language": ["en"]}, "list where text"),
        ({"label": {"a": 1}}, "dict where text"),
        ({"objects": 3}, "int where a list"),
        ({"objects": ["dog", None]}, "NoneType where text"),
        ({"objects": "[broken"}, "not a JSON list"),
        ({"questions": [{"question": "Is it?"}]}, "NoneType where text"),
        ({"questions": [["Is it?", "Yes", "No"]]}, "pairs of question and answer"),
        ({"questions": ["Is it?"]}, "pairs of question and answer"),
    ],
)
def test_each_bad_cell(change: dict[str, Any], message: str) -> None:
    row = one(GOOD | change)
    assert isinstance(row, Failure)
    assert (row.sample_id, row.stage) == ("s1", "read")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(row.message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": ["dog"], "boxes": []}, "1 objects and 0 boxes"),
        ({"boxes": [[0.1, 0.1, 0.5]]}, "not (x, y, width, height)"),
        ({"boxes": [[10, 10, 500, 500]]}, "in 0..1 of the image"),
        ({"boxes": [[0.1, 0.1, float("nan"), 0.5]]}, "in 0..1"),
        ({"boxes": [["a", 0.1, 0.1, 0.1]]}, "in 0..1"),
        ({"boxes": 7}, "int where a list was expected"),
    ],
)
def test_boxes_that_can_t_be_used_are_left_out_and_said_once(
    change: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "WARNED", set())
    for _ in range(3):
        sample = one(GOOD | change)
        assert isinstance(sample, Sample)
        assert (sample.caption, sample.boxes) == ("A dog.", None)
        assert sample.objects == (("dog",) if "objects" in change else None)
    (record,) = caplog.records
    assert "column 'boxes'" in record.message and message in record.message and "left out" in record.message


def test_objects_without_a_name_are_left_out_with_their_boxes() -> None:
    cells = {"objects": ["dog", " ", " cat "], "boxes": [[0.1, 0.1, 0.2, 0.2], [0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]]}
    sample = one(GOOD | cells)
    assert isinstance(sample, Sample)
    assert sample.objects == ("dog", "cat")
    assert sample.boxes == ((0.1, 0.1, 0.2, 0.2), (0.5, 0.5, 0.5, 0.5))
    assert object_names("dog, , cat,") == object_names('["dog", "", "cat"]') == ("dog", "cat")


def test_an_unreadable_record_has_no_identifier() -> None:
    assert one("not JSON") == Failure("", "here#0", "read", "not JSON")


CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "question"]), inner),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.dictionaries(st.sampled_from(EVERYTHING.used()), CELLS) | st.text(), max_size=40))
def test_whatever_the_cells_hold_each_row_is_answered(records: list[Any]) -> None:
    listed = [(f"here#{number}", record) for number, record in enumerate(records)]
    rows = list(samples(listed, EVERYTHING, True, no_images))
    assert [row.source for row in rows] == [source for source, _ in listed]
    for row in rows:
        pa.array([row.sample_id, row.message if isinstance(row, Failure) else row.caption]).cast(pa.large_string())


@pytest.fixture(params=["local", "s3"])
def put(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    return str if request.param == "local" else request.getfixturevalue("upload")


def test_image_folder(tmp_path: Path, rows: list[Row], put: Callable[[Path], str]) -> None:
    path = write_jsonl(tmp_path / "data", rows)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "data/images/0001.jpg").unlink()
    (tmp_path / "data/images/0002.jpg").write_bytes(b"")
    lines = path.read_text().splitlines()
    lines[3] = '{"file_name": '
    lines[4] = '["a list"]'
    lines[5] = json.dumps(json.loads(lines[5]) | {"file_name": "../secret.jpg"})
    lines[6] = json.dumps(json.loads(lines[6]) | {"file_name": str(tmp_path / "secret.jpg")})
    lines[7] = json.dumps(json.loads(lines[7]) | {"file_name": "a\0b"})
    path.write_text("\n".join(lines))
    read = read_all(put(tmp_path / "data"))
    found = failures(read)
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    assert "no image 'images/0001.jpg'" in found[1]
    assert "is empty" in found[2]
    assert "not JSON" in found[3]
    assert "list where a JSON object" in found[4]
    assert "leaves the data's folder" in found[5]
    assert "leaves the data's folder" in found[6]
    assert "can't be a file's" in found[7]
    assert read[1].sample_id == rows[1]["sample_id"]
    assert (read[3].sample_id, read[3].source) == ("", "metadata.jsonl#3")


@pytest.mark.timeout(60)
def test_links_pipes_devices_and_huge_files_in_an_image_folder(tmp_path: Path, rows: list[Row]) -> None:
    write_jsonl(tmp_path / "data", rows)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.jpg").write_bytes(rows[0]["image"]["bytes"])
    images = tmp_path / "data/images"
    for number in range(1, 7):
        (images / f"000{number}.jpg").unlink()
    (images / "0001.jpg").symlink_to(tmp_path / "outside/secret.jpg")
    (images / "0002.jpg").symlink_to("../../outside/secret.jpg")
    (images / "0003.jpg").symlink_to("/dev/zero")
    os.mkfifo(images / "0004.jpg")
    with (images / "0005.jpg").open("wb") as file:
        file.truncate(2 << 30)
    (images / "0006.jpg").symlink_to("0000.jpg")
    (images / "0007.jpg").unlink()
    (images / "0007.jpg").symlink_to("0007.jpg")
    read = read_all(str(tmp_path / "data"))
    found = failures(read)
    assert sorted(found) == [1, 2, 3, 4, 5, 7]
    assert all("is a link that leaves the data's folder" in found[number] for number in (1, 2, 3))
    assert "not a regular file" in found[4]
    assert "2,147,483,648 bytes, more than 67,108,864" in found[5]
    assert isinstance(read[6], Sample) and read[6].image == rows[0]["image"]["bytes"]


def test_a_folder_of_links_out_of_the_data(tmp_path: Path, rows: list[Row]) -> None:
    write_jsonl(tmp_path / "data", rows)
    (tmp_path / "data/images").rename(tmp_path / "images")
    (tmp_path / "data/images").symlink_to(tmp_path / "images")
    assert len(failures(read_all(str(tmp_path / "data")))) == len(rows)
    # The folder that the user names may be a link itself, and a snapshot of the Hugging Face cache is one of links.
    (tmp_path / "link").symlink_to(tmp_path / "images")
    write_jsonl(tmp_path / "cache/snapshots/1234", rows)
    (tmp_path / "cache/snapshots/1234/images").rename(tmp_path / "cache/blobs")
    (tmp_path / "cache/snapshots/1234/images").symlink_to("../../blobs")
    assert not failures(read_all(str(tmp_path / "cache/snapshots/1234")))


def test_objects_too_large_are_refused_unread(
    tmp_path: Path, rows: list[Row], upload: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "data", rows)
    data = upload(tmp_path / "data")
    monkeypatch.setattr(locations, "LARGEST_FILE", max(len(row["image"]["bytes"]) for row in rows) - 1)
    found = failures(read_all(data))
    assert found and len(found) < len(rows)
    assert all("bytes, more than" in message for message in found.values())


def test_csv(tmp_path: Path, rows: list[Row]) -> None:
    for row in rows:
        row["caption"] = "Two\nlines, and a comma."
    path = write_csv(tmp_path, rows)
    content = path.read_bytes() + b"only,two\n" + b"images/0000.jpg,s,caf\xe9,en,photo,,,,\n" + b"x" * 200_000 + b"\n"
    path.write_bytes(content)
    read = read_all(str(path))
    assert [row.caption for row in read[:9] if isinstance(row, Sample)] == ["Two\nlines, and a comma."] * 9
    assert list(failures(read)) == [9, 10, 11]
    assert "2 cells under 9 columns" in failures(read)[9]
    assert "caption: not valid Unicode" in failures(read)[10]
    assert "field larger than" in failures(read)[11]


def test_damaged_row_group(tmp_path: Path, rows: list[Row], put: Callable[[Path], str]) -> None:
    path = write_parquet(tmp_path / "data", rows, group=3, compression="zstd")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(3)
    content = bytearray(path.read_bytes())
    first = chunk.dictionary_page_offset or chunk.data_page_offset
    content[first : first + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    source = open_source(put(tmp_path / "data"))
    assert sorted(failures(read_all(source.data))) == [3, 4, 5]
    assert sorted(failures(list(source.read("data.parquet", 4, 8)))) == [0, 1]
    assert all("row group 1: unreadable Parquet" in text for text in failures(read_all(source.data)).values())


def test_parquet_file_cut_short_is_one_failure(tmp_path: Path, rows: list[Row], put: Callable[[Path], str]) -> None:
    write_parts(tmp_path / "data", rows)
    path = tmp_path / "data/language=a/data.parquet"
    path.write_bytes(path.read_bytes()[:2000])
    data = put(tmp_path / "data")
    assert [file.rows for file in open_source(data).files()] == [1, 6]
    read = read_all(data)
    assert list(failures(read)) == [0]
    assert read[0].source == "language=a/data.parquet#0"
    assert open_source(data).objects_vocabulary()


def test_parquet_files_that_differ(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path, rows, "a.parquet")
    write_parquet(tmp_path, [{"image": row["image"], "sample_id": row["sample_id"]} for row in rows], "b.parquet")
    read = read_all(str(tmp_path))
    assert sorted(failures(read)) == list(range(9, 18))
    assert read[9] == Failure(rows[0]["sample_id"], "b.parquet#0", "read", "no caption in column 'caption'")


def test_parquet_paths_and_text_that_is_not_unicode(tmp_path: Path, rows: list[Row]) -> None:
    (tmp_path / "0.jpg").write_bytes(rows[0]["image"]["bytes"])
    captions = pa.array([b"Fine.", b"caf\xe9", b"Fine.", b"Fine."]).view(pa.string())
    paths = pa.array(["0.jpg", "0.jpg", "../0.jpg", "/0.jpg"])
    pq.write_table(pa.table({"caption": captions, "image": paths}), tmp_path / "data.parquet")
    read = read_all(str(tmp_path))
    assert isinstance(read[0], Sample)
    assert read[0].image == rows[0]["image"]["bytes"]
    assert "not UTF-8" in failures(read)[1]
    assert "leaves" in failures(read)[2] and "leaves" in failures(read)[3]


def test_tar_members(tmp_path: Path, rows: list[Row], put: Callable[[Path], str]) -> None:
    image = rows[0]["image"]["bytes"]
    listed = [
        *members(rows[:1]),
        ("0001.jpg", image),
        ("0002.txt", b"No image."),
        ("0003.JPG", image),
        ("0003.txt", b"caf\xe9"),
        ("0004.jpg", image),
        ("0004.json", b"{broken"),
        ("../0005.jpg", image),
        ("../0005.txt", b"Up."),
        ("/etc/0006.jpg", image),
        ("0007.jpg", image),
        ("0007.txt", b"Fine."),
        ("0007.pkl", b"cos\nsystem\n(S'false'\ntR."),
        ("README", b"not a sample"),
    ]
    path = write_tar(tmp_path / "data/part.tar", listed)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("0008.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    read = read_all(put(tmp_path / "data"))
    found = failures(read)
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 8]
    assert "no caption" in found[1]
    assert "no image" in found[2]
    assert "member 0003.txt: 'utf-8' codec" in found[3]
    assert "member 0004.json" in found[4]
    assert "leaves the tar's folder" in found[5] and "leaves the tar's folder" in found[6]
    assert "is a link" in found[8]
    assert read[1].source == "part.tar#0001"


@pytest.mark.parametrize(("cut", "bad"), [(-1, 1), (600, 2), (10240, 1)])
def test_tar_cut_short(tmp_path: Path, rows: list[Row], cut: int, bad: int, put: Callable[[Path], str]) -> None:
    """In the last member's header; in its bytes; before the end mark."""
    path = write_tar(tmp_path / "data/part.tar", members(rows))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = {-1: last.offset + 100, 600: last.offset_data + 5, 10240: last.offset_data + 512}[cut]
    path.write_bytes(path.read_bytes()[:end])
    read = read_all(put(tmp_path / "data"))
    assert "what followed is lost" in failures(read)[len(read) - 1]
    assert len([row for row in read if isinstance(row, Sample)]) == (9 if cut == 10240 else 8)
    assert len(failures(read)) == (1 if cut == 10240 else 2)


def test_damage_in_the_middle_of_a_tar(tmp_path: Path, rows: list[Row]) -> None:
    path = write_tar(tmp_path / "part.tar", members(rows))
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[12].offset
    content = bytearray(path.read_bytes())
    content[middle : middle + 300] = b"x" * 300
    path.write_bytes(content)
    read = read_all(str(path))
    assert len(read) == 5
    assert "damaged" in failures(read)[4] and "what followed is lost" in failures(read)[4]


def test_coco(tmp_path: Path, rows: list[Row]) -> None:
    path = write_coco(tmp_path, rows)
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][1:]
    content["annotations"] += [{"id": 1, "image_id": 999, "caption": "Nowhere."}, "not an annotation"]
    content["annotations"][0]["caption"] = None
    content["images"] += [{"file_name": "no identifier.jpg"}]
    (tmp_path / "val2017/000000000001.jpg").unlink()
    path.write_text(json.dumps(content))
    instances = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(instances.read_text())
    content["annotations"] += [
        {"image_id": 2, "category_id": 12345, "bbox": [0, 0, 1, 1]},
        {"image_id": 3, "category_id": 1, "bbox": "broken"},
    ]
    instances.write_text(json.dumps(content))
    read = read_all(str(path))
    found = failures(read)
    assert sorted(found) == [0, 1, 7, 8, 9, 10, 11]
    assert "no image '000000000001.jpg'" in found[0]
    assert "objects: NoneType" in found[1]
    assert isinstance(read[2], Sample) and read[2].objects and read[2].boxes is None
    assert "no caption" in found[7] and "no caption" in found[8]
    assert (read[7].sample_id, read[8].sample_id) == ("8-108", "9")
    assert "without an id" in found[9]
    assert "image 999" in found[10]


def test_objects_that_cannot_be_read_are_passed_over_in_the_vocabulary(tmp_path: Path, rows: list[Row]) -> None:
    path = write_jsonl(tmp_path, rows[:2])
    path.write_text(path.read_text() + '{"file_name": "images/0000.jpg", "caption": "A.", "objects": [1]}\nbroken\n')
    assert open_source(str(path)).objects_vocabulary() == tuple(
        sorted({name for row in rows[:2] for name in row["objects"]})
    )
