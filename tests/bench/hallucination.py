"""Neurons that predict which mentions of a model's captions are hallucinated, and what changing them does.

    python -m tests.bench.hallucination --scenes 1500
    python -m tests.bench.hallucination --model CHECKPOINT --dtype bf16 --scenes 600 --folder RUNS --write

Captions of fresh scenes, a third of them for testing: AUROC of the probe next to log-probability, length and position,
the detector and random neurons; then captions with the neurons scaled, and by other decodings. With `--folder`, a
stopped call goes on. `--write` puts the table of these into the README.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import mmray
from mmray.features.hallucination.neuron_driver import run_neurons
from mmray.features.hallucination.settings import neuron_settings
from mmray.features.hallucination.view import doses, probe
from mmray.runs.run import open_run
from tests.bench.second_sight import fresh
from tests.bench.writing import markdown, write

README, COMMAND = "mmray/features/hallucination/README.md", "python -m tests.bench.hallucination --write"
DECODED = ("vcd:0.5", "vcd:1", "vcd:2", "no-image:1", "pai:0.05", "pai:0.1", "pai:0.5", "average:0.75")
"""Decodings to compare with, the published strengths among them."""
DOUBTED = ("0.3", "0.5", "0.7", "0.1:average", "0.2:average", "0.3:average")
"""Probabilities below which a mention is written again, by the model alone or by averaged views."""
HEAD = ("neurons", "change", "CHAIR_i", "of the unchanged", "recall", "of the unchanged", "words", "of the unchanged")
ASKED = ("POPE, yes", "POPE, F1")
"""Further columns, with --questions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--tested", type=int, default=200, help="test images captioned under each intervention")
    parser.add_argument("--questions", type=int, default=0, help="present objects per image that POPE asks about")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.0, 0.5, 2.0, 3.0])
    parser.add_argument("--decoding", nargs="*", default=DECODED)
    parser.add_argument("--ban-below", nargs="*", default=DOUBTED)
    parser.add_argument("--write", action="store_true", help="put the table of doses into the README")
    parser.add_argument("--workers", help="default: this process, without Ray")
    parser.add_argument("--folder", help="where the run is kept; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = fresh(str(folder), arguments.scenes)
        where: dict[str, Any] = {"workers": arguments.workers} if arguments.workers else {"executor": "local"}
        run = mmray.census(arguments.model, data, f"{folder}/run", limit=4, dtype=arguments.dtype, **where)
        given = {"run": run.uri, "data": data, "interventions": True, "local": not arguments.workers}
        given |= {"decoding": list(arguments.decoding), "doses": arguments.doses}
        given["ban_below"] = list(arguments.ban_below)
        sizes = {"tested": arguments.tested, "questions": arguments.questions, "workers": arguments.workers}
        done = run_neurons(neuron_settings(given | sizes))
        # Wide enough for every column, whatever the terminal.
        console = Console(width=150)
        console.print(probe(done.headline["measures"]))
        console.print(doses(done.headline["doses"]))
        table = markdown((*HEAD, *ASKED) if arguments.questions else HEAD, frontier(done.headline["doses"]))
        print(table)
        if arguments.write:
            write(README, COMMAND, table)
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


def frontier(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row per condition: what it does to hallucination, and what recall and length pay for it."""
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["neurons"], row["change"], row["dose"]), {})[row["measure"]] = row
    lines, asked = [], [name for name in ("pope_yes", "pope_f1") if any(row["measure"] == name for row in rows)]
    for (neurons, change, dose), own in found.items():
        said = " ".join(["" if change is None else change, *([] if dose is None else [f"{dose:g}"])])
        line = [neurons, said]
        for name, digits in (("chair_i", 3), ("recall", 3), ("length", 2)):
            value, relative = own[name]["value"], own.get(f"{name} relative", {})
            line.append("–" if value is None else f"{value:.{digits}f}")
            known = relative.get("low") is not None
            line.append("{value:.2f} ({low:.2f} – {high:.2f})".format(**relative) if known else "")
        # Captions without doubted mentions answer no question.
        line += [f"{own[name]['value']:.2f}" if name in own else "" for name in asked]
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
