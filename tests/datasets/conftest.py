"""Rows of the demo data, and an S3 that answers on loopback only."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

import mmray.demo
from mmray import storage
from tests.datasets.making import Row

BUCKET = "mmray-test"


@pytest.fixture(scope="session")
def demo_rows() -> list[Row]:
    table = pq.ParquetFile(mmray.demo.DATA).read_row_group(0)
    return [row for row in table.to_pylist() if row["objects"]][:9]


@pytest.fixture
def rows(demo_rows: list[Row]) -> list[Row]:
    return [dict(row) for row in demo_rows]


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        storage.s3_client.cache_clear()
        storage.s3_client().create_bucket(Bucket=BUCKET)
        yield BUCKET
        storage.s3_client.cache_clear()
    server.stop()


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
