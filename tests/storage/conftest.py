"""A fresh store of each kind."""

import uuid
from pathlib import Path

import pytest

from mmray.storage import Store, open_store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(tmp_path / "store")
    return open_store(f"s3://{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}/run")
