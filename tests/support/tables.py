"""Two runs compared table by table."""

from mmray.features.census.tables import TABLES
from mmray.runs.run import Run


def same_tables(ours: Run, theirs: Run) -> None:
    samples = ours.table("captions")["sample_id"].to_pylist()
    assert len(samples) == len(set(samples))
    for name in TABLES:
        assert ours.table(name).equals(theirs.table(name)), name
