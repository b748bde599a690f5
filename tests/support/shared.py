"""What is expensive to make and only read, made once for all processes of a session; and a folder in memory."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return what makes a folder, by the name it has, unless a process of this session has made it: only read it."""
    base = tmp_path_factory.getbasetemp()
    # Processes of pytest-xdist have folders of their own in a common one, which is this session's alone.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        made = root / name
        with (root / f"{name}.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The file says "made" once the folder is: runs know where their data lies, so that none can be renamed.
            lock.seek(0)
            if lock.read() != "made":
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                make(made)
                lock.write("made")
        return made

    return folder


@pytest.fixture(scope="session")
def demo_census(shared: Callable[..., Path]) -> Callable[..., Path]:
    """Return what gives the demo model's census of the first scenes of its data, with these settings: only read it."""

    def run(limit: int, **settings: Any) -> Path:
        from tests.support.local_jobs import census_here

        def make(folder: Path) -> None:
            assert census_here("demo", "demo", folder / "run", limit=limit, **settings).complete

        name = "-".join(["demo", str(limit), *(f"{key}={value}" for key, value in sorted(settings.items()))])
        return shared(name, make) / "run"

    return run


@pytest.fixture(scope="module")
def own_census(demo_census: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what gives a copy of such a census, which the tests of a module may add to and change."""
    return lambda *asked, **settings: Path(
        shutil.copytree(demo_census(*asked, **settings), tmp_path_factory.mktemp("census") / "run")
    )


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """Return a folder in memory where there is one: these tests write much, and each file is synced."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)
