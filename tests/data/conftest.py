"""Rows of the demo data, on disk and on S3."""

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import mmray.demo
from mmray import storage
from tests.support.data_files import Row


@pytest.fixture(scope="session")
def demo_rows() -> list[Row]:
    table = pq.ParquetFile(mmray.demo.DATA).read_row_group(0)
    return [row for row in table.to_pylist() if row["objects"]][:9]


@pytest.fixture
def rows(demo_rows: list[Row]) -> list[Row]:
    return [dict(row) for row in demo_rows]


@pytest.fixture
def upload(bucket: str, tmp_path: Path) -> Callable[[Path], str]:
    """Copy all below `tmp_path` to S3; return the URI that a path has there."""

    def to_s3(path: Path) -> str:
        store = storage.open_store(f"s3://{bucket}/{tmp_path.name}")
        for file in tmp_path.rglob("*"):
            if file.is_file():
                store.put(file.relative_to(tmp_path).as_posix(), file.read_bytes())
        return f"s3://{bucket}/{path.relative_to(tmp_path.parent).as_posix()}"

    return to_s3
