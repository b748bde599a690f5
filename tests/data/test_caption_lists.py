"""A row with a list of captions is as many samples of one image, in every form of data and however it is cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmray.data.columns import OFF, Columns
from mmray.data.samples import Failure, Sample
from mmray.data.shards import cut, read_shard
from mmray.data.sources import open_source
from tests.support.data_files import (
    Row,
    failures,
    read_all,
    write_csv,
    write_images,
    write_jsonl,
    write_parquet,
    write_parts,
    write_tar,
)

CAPTIONS: list[list[str | None]] = [
    ["A dog.", "Two dogs."],
    ["One cat."],
    ["", "A hat.", None, "A red hat.", " ", "Hats."],
    ["A ship."] * 2,
    ["A tree.", "Trees.", "A wood.", "Wood.", "Leaves."],
    ["A bird.", "[A bird] in brackets."],
    [],
    ["", None],
    ["The end."],
]


def told(rows: list[Row]) -> list[tuple[Any, ...]]:
    """Return what there is to read of rows, by hand: identifier, caption, image, objects; a failure's identifier."""
    found: list[tuple[Any, ...]] = []
    for row in rows:
        kept = [text for text in row["caption"] if text is not None and text.strip()]
        names = [f"{row['sample_id']}-{n}" for n in range(len(kept))] if len(kept) > 1 else [row["sample_id"]]
        objects = tuple(row["objects"])
        found += [(name, text, row["image"]["bytes"], objects) for name, text in zip(names, kept, strict=False)]
        found += [] if kept else [(row["sample_id"],)]
    return found


def facts(rows: list[Sample | Failure]) -> list[tuple[Any, ...]]:
    return [
        (row.sample_id, row.caption, row.image, row.objects) if isinstance(row, Sample) else (row.sample_id,)
        for row in rows
    ]


@pytest.fixture
def several(rows: list[Row]) -> list[Row]:
    return [row | {"caption": captions} for row, captions in zip(rows, CAPTIONS, strict=True)]


def write_json_tars(folder: Path, rows: list[Row]) -> Path:
    """Captions are a list in the json member."""
    for half, name in ((rows[:4], "a.tar"), (rows[4:], "b.tar")):
        listed = []
        for number, row in enumerate(half):
            rest = {key: value for key, value in row.items() if key != "image"}
            listed += [(f"{number}.jpg", row["image"]["bytes"]), (f"{number}.json", json.dumps(rest).encode())]
        write_tar(folder / name, listed)
    return folder


def write_hub(folder: Path, rows: list[Row]) -> str:
    write_parquet(folder / "data", rows)
    (folder / "data/data.parquet").rename(folder / "data/train-00000-of-00001.parquet")
    return f"hf:{folder}"


FORMS: dict[str, Callable[[Path, list[Row]], Path | str]] = {
    "parquet file": write_parquet,
    "parquet folder": write_parts,
    "tars": write_json_tars,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "hub": write_hub,
}


@pytest.mark.parametrize("form", FORMS)
def test_each_caption_is_a_sample(tmp_path: Path, several: list[Row], form: str) -> None:
    data = str(FORMS[form](tmp_path / "data", several))
    read = read_all(data)
    assert facts(read) == told(several)
    assert sum(file.rows for file in open_source(data).files()) == len(read) == 18
    assert list(failures(read).values()) == ["no caption in column 'caption'"] * 2
    for shard_size, limit in ((1, None), (4, None), (5, 9), (100, 3)):
        source = open_source(data)
        manifest = cut(source.files(), shard_size, limit)
        parts = [list(read_shard(source, shard)) for shard in manifest.shards]
        assert [len(part) for part in parts] == [shard.samples for shard in manifest.shards]
        assert [row for part in parts for row in part] == read[: limit or 18]
        # A census keeps the captions of an image together.
        for shard in cut(source.files(), shard_size, limit, source.image_end).shards[:-1]:
            piece = shard.pieces[-1]
            end = source.image_end(piece.path, piece.stop)
            assert end == piece.stop


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_writes_captions_itself_sees_an_image_once(tmp_path: Path, several: list[Row], form: str) -> None:
    read = read_all(str(FORMS[form](tmp_path / "data", several)), captions=False)
    assert [row.sample_id for row in read] == [row["sample_id"] for row in several]
    assert not failures(read)


def test_without_identifiers_image_and_caption_tell_samples_apart(tmp_path: Path, several: list[Row]) -> None:
    data = str(write_parquet(tmp_path, several))
    read = read_all(data, columns=Columns(sample_id=OFF))
    names = [row.sample_id for row in read if isinstance(row, Sample)]
    assert len(set(names)) == len(names) - 1  # of the row that has one caption twice
    single = [row | {"caption": text} for row in several for text in row["caption"] if text and text.strip()]
    alone = read_all(str(write_parquet(tmp_path / "single", single)), columns=Columns(sample_id=OFF))
    assert [row.sample_id for row in alone] == names


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.sampled_from(["A dog.", "A cat.", "", None]), max_size=4), min_size=1, max_size=70),
    st.integers(1, 40),
    st.data(),
)
def test_any_range_of_samples_is_that_range_of_all(
    tmp_path: Path, captions: list[list[str | None]], group: int, data: st.DataObject
) -> None:
    table = pa.table(
        {"image": [b"image"] * len(captions), "caption": pa.array(captions, pa.list_(pa.string())), "n": captions}
        if any(any(row) for row in captions)
        else {"image": [b"image"], "caption": pa.array([["A dog."]], pa.list_(pa.string()))}
    )
    pq.write_table(table.select(["image", "caption"]), tmp_path / "data.parquet", row_group_size=group)
    source = open_source(str(tmp_path / "data.parquet"))
    (file,) = source.files()
    whole = list(source.read(file.path, 0, file.rows))
    assert len(whole) == file.rows
    start = data.draw(st.integers(0, file.rows))
    stop = data.draw(st.integers(start, file.rows + 3))
    assert list(source.read(file.path, start, stop)) == whole[start:stop]


def test_damaged_rows_are_counted_as_they_are_read(tmp_path: Path, several: list[Row]) -> None:
    path = write_parquet(tmp_path, several[:6], group=2, compression="zstd")
    content = bytearray(path.read_bytes())
    names = pq.ParquetFile(path).schema_arrow.names
    facts = pq.ParquetFile(path).metadata
    leaves = [facts.row_group(0).column(number).path_in_schema for number in range(facts.num_columns)]
    assert "caption" in names
    for group, column in ((0, "caption.list.element"), (2, "image.bytes")):
        chunk = facts.row_group(group).column(leaves.index(column))
        first = chunk.dictionary_page_offset or chunk.data_page_offset
        content[first : first + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(content)
    read = read_all(str(path))
    found = failures(read)
    # Two rows whose captions can't be counted are one failure each, and two rows of 5 and 2 captions seven.
    assert sorted(found) == [0, 1, 7, 8, 9, 10, 11, 12, 13]
    assert all("unreadable Parquet" in message for message in found.values())
    assert [row.caption for row in read if isinstance(row, Sample)] == [
        "A hat.",
        "A red hat.",
        "Hats.",
        *["A ship."] * 2,
    ]


def test_a_list_far_down_in_json_lines_is_found(tmp_path: Path, rows: list[Row]) -> None:
    (name, *_) = write_images(tmp_path, rows[:1])
    lines = [json.dumps({"file_name": name, "caption": f"Caption {number}."}) for number in range(40)]
    lines[30] = json.dumps({"file_name": name, "caption": ["One.", "Two."]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    read = read_all(str(tmp_path))
    assert len(read) == 41 and not failures(read)
    assert [row.caption for row in read if isinstance(row, Sample)][30:32] == ["One.", "Two."]


def test_a_list_where_the_first_rows_have_texts_is_a_row_in_errors(tmp_path: Path, rows: list[Row]) -> None:
    write_parquet(tmp_path, rows[:2], "a.parquet")
    write_parquet(tmp_path, [rows[2] | {"caption": ["One.", "Two."]}], "b.parquet")
    found = failures(read_all(str(tmp_path)))
    assert list(found) == [2]
    assert "a list of captions, where the first rows of the data have one text each" in found[2]
