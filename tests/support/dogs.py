"""A small run of the demo's model on English scenes, each dog among them; measured properties, other tables made up."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.demo import DATA
from tests.support.judged import add_judgements
from tests.support.labelled import add_labels
from tests.support.local_jobs import census_here, properties_here

SCENES = 24


def dog_run(folder: Path) -> None:
    """Make the run below this folder."""
    english = [row for row in pq.read_table(DATA).to_pylist() if row["language"] == "en"]
    dogs = [row for row in english if "dog" in row["objects"]]
    others = [row for row in english if "dog" not in row["objects"]]
    rows = [*dogs, *others[: SCENES - len(dogs)]]
    rows[-1]["image"] = {"bytes": b"no picture", "path": None}
    rows[-2]["caption"] = "An image of a <script>alert('dog')</script> & co."
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(DATA)), folder / "data.parquet")
    out = folder / "run"
    census_here("demo", str(folder / "data.parquet"), out, shard_size=20)
    properties_here(out, concepts=1, images=2, maps=2, longest=4, draws=20)
    add_labels(out)
    add_judgements(out)
