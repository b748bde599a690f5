"""A small run with a bad sample or two, made once a session and worker: leave it as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mmray.demo import DATA
    from mmray.runs.run import open_run
    from tests.support.local_jobs import census_here

    folder = tmp_path_factory.mktemp("results")
    # Objects have English names, and no concepts.json that translates them lies next to data written here.
    rows = [row for row in pq.read_table(DATA).slice(0, 120).to_pylist() if row["language"] == "en"][:24]
    rows[3]["image"] = {"bytes": b"no picture", "path": None}
    rows[5]["caption"] = ""
    rows[7]["caption"] += " [/b] [red]"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), folder / "data.parquet")
    out = folder / "run"
    census_here(tiny("llava"), str(folder / "data.parquet"), out, shard_size=10, top_k=5)
    return open_run(out)
