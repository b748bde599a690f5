"""The run of dogs, served with the model that it analysed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.dogs import dog_run
from tests.support.served import Client, serving


@pytest.fixture(scope="package")
def dogs(shared: Callable[..., Path]) -> Path:
    return shared("dogs", dog_run) / "run"


@pytest.fixture(scope="package")
def ask(dogs: Path) -> Iterator[Client]:
    with serving(dogs, "demo") as client:
        yield client
