"""MMEdit's table on the demo: edits of fresh scenes' records by every method, on a census of the demo's scenes.

python -m tests.bench.mmedit --run RUN                  # 24 records of E-VQA and of E-IC; --write: into the README
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from mmray.engine import run as run_job
from mmray.features.mmedit.job import MmeditJob
from mmray.features.mmedit.settings import mmedit_settings
from mmray.features.mmedit.summary import BEYOND, FIVE, HARMONIC
from mmray.features.mmedit.view import SHORT
from mmray.runs.run import open_run
from tests.bench import writing
from tests.support.mmedit_files import write_records

README, COMMAND = "mmray/features/mmedit/README.md", "python -m tests.bench.mmedit --run RUN --write"
SHOWN = ("published", "corrected")
"""Protocols in the README."""


def readme_table(rows: list[dict[str, Any]]) -> str:
    """Return each task's methods under the published and the corrected definition, intervals of the mean alone."""
    found = {tuple(row[name] for name in ("task", "method", "protocol", "measure")): row for row in rows}
    tasks, methods = ([*dict.fromkeys(row[name] for row in rows)] for name in ("task", "method"))

    def cell(task: str, protocol: str, method: str, measure: str) -> str:
        row = found.get((task, method, protocol, measure))
        if row is None or row["value"] is None:
            return "–"
        of = [found.get((task, other, protocol, measure)) for other in methods]
        best = row["value"] == max(one["value"] for one in of if one is not None)
        value = f"**{row['value']:.3f}**" if best else f"{row['value']:.3f}"
        return f"{value} ({row['low']:.2f} – {row['high']:.2f})" if measure == HARMONIC else value

    tables = []
    for task in tasks:
        for protocol in SHOWN:
            measures = (*FIVE, HARMONIC, *(BEYOND if protocol == "corrected" else ()))
            shown = [one for one in measures if any((task, method, protocol, one) in found for method in methods)]
            body = [[method, *(cell(task, protocol, method, one) for one in shown)] for method in methods]
            n = max(row["n"] for row in rows if row["task"] == task)
            tables.append(writing.markdown([f"{task}, {protocol}, n = {n}", *(SHORT[one] for one in shown)], body))
    return "\n".join(tables)


def main(
    run: Annotated[str, typer.Option(help="A census of the demo.")],
    records: Annotated[int, typer.Option(help="Of each task.")] = 24,
    write: Annotated[bool, typer.Option("--write", help="Put the table into the README.")] = False,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vqa, captioning = map(str, write_records(Path(folder) / "records", records))
        job = MmeditJob(mmedit_settings({"run": run, "vqa": vqa, "captioning": captioning, "local": True}))
        done = run_job(job, follow=lambda progress: print(progress, flush=True))
    table = readme_table(open_run(run).table("mmedit").to_pylist())
    print(table, f"{done.seconds:.0f} s", sep="\n")
    if write:
        writing.write(README, COMMAND, table)


if __name__ == "__main__":
    typer.run(main)
