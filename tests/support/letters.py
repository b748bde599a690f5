"""Text for the toy job to count, and what it counted."""

from typing import Any

from mmray.runs.tables import read_table
from mmray.storage import open_store
from tests.support.words import LetterJob

LINES = [f"{'abc'[n % 3]}{n}" for n in range(95)]


def counted(job: LetterJob) -> dict[str, list[Any]]:
    """Return the toy's table."""
    return read_table(open_store(job.target), "letters").to_pydict()
