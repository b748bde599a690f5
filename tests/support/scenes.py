"""A few of the demo's scenes as a user's own data, good and bad."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.demo import DATA


def scenes(count: int) -> list[dict[str, object]]:
    # Objects have English names, and no concepts.json that translates them lies next to data written here.
    return [row for row in pq.read_table(DATA).slice(0, 8 * count).to_pylist() if row["language"] == "en"][:count]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), path)
    return str(path)


def bad_samples() -> list[dict[str, object]]:
    rows = scenes(12)
    rows[0]["image"] = {"bytes": b"no picture", "path": None}
    rows[1]["caption"] = ""
    rows[2]["caption"] = "!!!"
    return rows
