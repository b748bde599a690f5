"""A run as version 0.1.0 left it: without snapshots, and without the tables and columns that came later."""

import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

LATER_COLUMNS = {
    "captions": ["token_spans", "text_start", "image_spans"],
    "examples": ["shard_id"],
    "heatmaps": ["neuron"],
    "rankings": ["n_images", "certified_specific", "certified_selective", "exact"],
}
LATER_TABLES = ("concepts", "neuron_concepts")


def earlier_run(run: Path, out: Path) -> Path:
    """Copy a run to `out` as the earlier version would have written it."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("snapshots"))
    for name in LATER_TABLES:
        (out / "tables" / f"{name}.parquet").unlink()
    for name, columns in LATER_COLUMNS.items():
        file = out / "tables" / f"{name}.parquet"
        table = pq.read_table(file)
        if name == "heatmaps":
            table = table.filter(pc.is_null(table["neuron"]))
        pq.write_table(table.drop_columns(columns), file)
    return out
