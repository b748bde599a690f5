"""Neurons that predict which mentions of a model's captions are hallucinated, and what changing them does.

    python -m tests.bench.hallucination --scenes 1500
    python -m tests.bench.hallucination --model CHECKPOINT --scenes 5000 --workers 1 --folder RUNS

Captions of fresh scenes, a third of them for testing: AUROC of the probe next to log-probability, length and position,
the detector and random neurons; then captions with the neurons scaled. With `--folder`, a stopped call goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import mmray
from mmray.features.hallucination.neuron_driver import run_neurons
from mmray.features.hallucination.settings import neuron_settings
from mmray.features.hallucination.view import doses, probe
from mmray.runs.run import open_run
from tests.bench.second_sight import fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--tested", type=int, default=200, help="test images captioned under each intervention")
    parser.add_argument("--questions", type=int, default=0, help="present objects per image that POPE asks about")
    parser.add_argument("--workers", help="default: this process, without Ray")
    parser.add_argument("--folder", help="where the run is kept; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = fresh(str(folder), arguments.scenes)
        where: dict[str, Any] = {"workers": arguments.workers} if arguments.workers else {"executor": "local"}
        run = mmray.census(arguments.model, data, f"{folder}/run", limit=4, **where)
        given = {"run": run.uri, "data": data, "interventions": True, "local": not arguments.workers}
        sizes = {"tested": arguments.tested, "questions": arguments.questions, "workers": arguments.workers}
        done = run_neurons(neuron_settings(given | sizes))
        # Wide enough for every column, whatever the terminal.
        console = Console(width=150)
        console.print(probe(done.headline["measures"]))
        console.print(doses(done.headline["doses"]))
        rows = open_run(run.uri).table("hallucination_neurons").to_pylist()
        signed = [[row[end] * row["effect"] for end in ("low", "high")] for row in rows if row["low"] is not None]
        held = [ends for ends in signed if min(ends) > 0]
        mentions = open_run(run.uri).table("hallucination_mentions").to_pylist()
        wrong = sum(row["hallucinated"] for row in mentions)
        neurons = sum(run.info["model"]["widths"])
        print(
            f"{len(mentions):,} mentions, {wrong / len(mentions):.1%} hallucinated; {len(rows)} of {neurons:,} neurons"
        )
        print(f"{len(held)} of them have an effect of the same sign on test images, by an interval without zero")
        print(f"{sum(one.seconds for one in done.passes):.0f} s")


if __name__ == "__main__":
    main()
