"""Small files that unpack to gigabytes are refused before they do, row by row, and cost their neighbours nothing."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmray.data import parquet, rows
from mmray.data.images import LARGEST_FILE
from mmray.data.samples import Failure, Sample
from mmray.data.sources import open_source
from mmray.data.webdataset import LARGEST_TEXT
from tests.support.data_files import Row, failures, members, read_all, write_tar

MIB = 1 << 20


def test_rows_that_share_a_large_value_are_read_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(
        pa.table({"image": [bytes(MIB)] * 60, "caption": ["A dog."] * 60}),
        tmp_path / "data.parquet",
        compression="zstd",
    )
    assert (tmp_path / "data.parquet").stat().st_size < 4096
    held: list[int] = []
    records_of = parquet.records_of

    def spied(batch: pa.RecordBatch) -> Any:
        held.append(batch.nbytes)
        return records_of(batch)

    monkeypatch.setattr(parquet, "records_of", spied)
    monkeypatch.setattr(parquet, "HELD", 5 * MIB)
    monkeypatch.setattr(rows, "HELD", 5 * MIB)
    read = read_all(str(tmp_path))
    assert len(read) == 60 and all(isinstance(row, Sample) for row in read)
    assert max(held) < 6 * MIB
    part = list(open_source(str(tmp_path)).read("data.parquet", 7, 13))
    assert [row.source for row in part] == [f"data.parquet#{row}" for row in range(7, 13)]


def test_a_column_that_unpacks_to_much_more_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [b"image", bytes(4 * MIB), b"image", b"image"]
    table = pa.table({"image": images, "caption": ["A dog."] * 4})
    pq.write_table(table, tmp_path / "data.parquet", compression="zstd", row_group_size=2)
    monkeypatch.setattr(parquet, "SUSPECT", MIB)
    found = failures(read_all(str(tmp_path)))
    assert sorted(found) == [0, 1]
    assert "row group 0: column 'image' unpacks from" in found[0]


def test_values_too_large_for_an_image_are_a_row_each(tmp_path: Path) -> None:
    table = pa.table({"image": [b"image", bytes(LARGEST_FILE + 1)], "caption": ["A dog."] * 2})
    pq.write_table(table, tmp_path / "data.parquet", compression="zstd")
    found = failures(read_all(str(tmp_path)))
    assert list(found) == [1]
    assert f"{LARGEST_FILE + 1:,} bytes, more than {LARGEST_FILE:,}" in found[1]


def bomb(kind: bytes, size: int) -> bytes:
    """Return the header of a member that says that it is so long."""
    info = tarfile.TarInfo("bomb.jpg")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_gigabytes_is_one_row(tmp_path: Path, rows: list[Row], kind: bytes) -> None:
    path = write_tar(tmp_path / "part.tar", members(rows))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + bomb(kind, 12 << 30) + bytes(10240))
    read = read_all(str(path))
    assert list(failures(read)) == [len(rows)]
    assert f"a header of {12 << 30:,} bytes, more than {LARGEST_TEXT:,}" in failures(read)[len(rows)]


def test_long_names_are_read_as_ever(tmp_path: Path, rows: list[Row]) -> None:
    listed = [(f"{'deep/' * 60}{name}", content) for name, content in members(rows)]
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(tmp_path / f"part{number}.tar", "w", format=form) as tar:
            for name, content in listed:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    read = read_all(str(tmp_path))
    assert len(read) == 2 * len(rows) and not failures(read)


@pytest.mark.parametrize("suffix", ["jpg", "txt", "json"])
def test_members_of_gigabytes_are_a_row_each(tmp_path: Path, rows: list[Row], suffix: str) -> None:
    listed = members(rows[:3])
    path = tmp_path / "part.tar"
    with path.open("wb") as file:
        for name, content in listed:
            info = tarfile.TarInfo(name)
            large = name == f"0001.{suffix}"
            info.size = 30 << 30 if large else len(content)
            file.write(info.tobuf(tarfile.GNU_FORMAT) + (b"" if large else content))
            file.seek(info.size if large else -len(content) % 512, io.SEEK_CUR)
        file.seek(1024, io.SEEK_CUR)
        file.truncate()
    read = read_all(str(path))
    assert list(failures(read)) == [1]
    assert f"member 0001.{suffix}: {30 << 30:,} bytes, more than" in failures(read)[1]
    assert [type(row) for row in read] == [Sample, Failure, Sample]


def test_a_sparse_member_is_a_row(tmp_path: Path, rows: list[Row]) -> None:
    header = bytearray(bomb(tarfile.GNUTYPE_SPARSE, 0))
    header[386:410] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"%011o\0" % (4 << 30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    path = write_tar(tmp_path / "part.tar", members(rows[:1]))
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    path.write_bytes(path.read_bytes()[:end] + bytes(header) + bytes(10240))
    found = failures(read_all(str(path)))
    assert list(found) == [1]
    assert "is sparse" in found[1]
