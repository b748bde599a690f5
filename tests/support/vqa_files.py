"""Data of visual question answering made from the demo's scenes: a question per scene, ten answers, style as domain."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmray.demo import DATA

PEOPLE = 10


def vqa_rows() -> Iterator[dict[str, Any]]:
    """Yield rows; every third scene has three people who answer something else."""
    for number, scene in enumerate(row for row in pq.read_table(DATA).to_pylist() if row["language"] == "en"):
        asked = scene["questions"][number % len(scene["questions"])]
        others = 3 if number % 3 == 0 else 0
        answers = [asked["answer"]] * (PEOPLE - others) + ["nothing"] * others
        yield {
            "sample_id": scene["sample_id"],
            "image": scene["image"],
            "question": asked["question"],
            # As in VQAv2 on the hub.
            "answers": [{"answer": answer, "answer_id": one} for one, answer in enumerate(answers, 1)],
            "domain": scene["domain"],
        }


def _of(rows: list[dict[str, Any]], domain: str) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["domain"] == domain)


def vqa_file(path: Path, count: int, domains: Sequence[str]) -> str:
    """Write `count` rows as Parquet, as many of each of these domains, and return the path."""
    every = list(vqa_rows())
    rows = [row for one in domains for row in islice(_of(every, one), count // len(domains))]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)
