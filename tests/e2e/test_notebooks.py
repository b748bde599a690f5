"""The notebooks of jobs/notebooks run from the first cell to the last, and have been committed with what they show."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from tests.support.dogs import dog_run
from tests.support.notebooks import FOLDER, NOTEBOOKS, executed


@pytest.fixture
def run(shared: Callable[..., Path], bucket: str) -> str:
    """Return a run on S3."""
    from mmray.storage import open_store

    made, uri = shared("dogs", dog_run) / "run", f"s3://{bucket}/runs/dogs"
    store = open_store(uri)
    for file in made.rglob("*"):
        if file.is_file():
            store.put(file.relative_to(made).as_posix(), file.read_bytes())
    return uri


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs(name: str, tmp_path: Path, run: str):
    done = executed(name, tmp_path, run)
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_results_are_committed(name: str):
    cells = [cell for cell in nbformat.read(FOLDER / name, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 1
