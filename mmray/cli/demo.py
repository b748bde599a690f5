"""The command `mmray demo`: census, properties, edits and report, with a few lines about each."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mmray.features.census.command import follow_census, say_shortfall
from mmray.features.census.settings import CensusSettings, census_settings
from mmray.terminal.options import INCOMPLETE, app, command_line, console, say, say_next

FULL, QUICK = (12, 2), (2, 1)
"""Concepts whose properties are measured, and heat maps per concept."""
EDIT, QUICK_EDIT = {"kept": 256, "samples": 16}, {"kept": 64, "samples": 8, "neurons": 50}
"""Settings of the edits."""
SCENES, QUICK_SCENES = 64, 24
"""Scenes that the edits are evaluated on."""


@app.command(group="Run", examples=("mmray demo", "mmray demo --quick --out /tmp/demo"))
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("mmray-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="The first 256 scenes instead of all 1,536.")] = False,
) -> None:
    """Run the whole main job on the embedded model and data: no network, no GPU."""
    from mmray.engine.session import ray_session

    console.file = sys.stdout  # a Ray session sends everything else that is printed to stderr
    try:
        with ray_session(None):  # shared by all steps
            complete = _run_demo(out / ("quick" if quick else "full"), quick=quick)
    finally:
        console.file = None  # type: ignore[assignment]  # back to the current sys.stdout
    if not complete:
        raise typer.Exit(INCOMPLETE)


def _run_demo(run_folder: Path, *, quick: bool) -> bool:
    """Run the demo's steps and print their findings; return whether nothing failed."""
    from mmray.features.census.view import summary
    from mmray.runs.run import open_run

    say(f"1 census of the demo's scenes on a local Ray → {run_folder}", "bold")
    settings = census_settings(
        {
            "model": "demo",
            "data": "demo",
            "out": str(run_folder),
            "limit": 256 if quick else None,
            "shard_size": 128 if quick else 256,
        }
    )
    outcome = follow_census(settings)
    run = open_run(run_folder)
    console.print(
        f"  {outcome.samples:,} scenes, {len(run.concepts)} concepts, {sum(run.concepts.values()):,} occurrences, "
        f"{sum(run.info['model']['widths']):,} neurons each, {outcome.seconds:.0f} s"
    )
    say_shortfall(outcome)
    say("2 rankings: which neurons write a noun, and what else they write\n", "bold")
    console.print(summary(run, list(run.concepts)[:3]))
    complete = _say_meaning(run_folder, *(QUICK if quick else FULL))
    complete &= _say_edits(settings, quick=quick)
    _say_report(run_folder)
    concept = next(iter(run.concepts))
    first = run.rank(concept, 1)["neuron"][0].as_py()
    say_next(command_line("rank", run_folder, concept), command_line("neuron", run_folder, first))
    return outcome.complete and complete


def _say_meaning(run: Path, concepts: int, maps: int) -> bool:
    """Draw heat maps of all concepts, measure the most frequent ones, and print findings; return as `_run_demo`."""
    from mmray.engine import run as run_job
    from mmray.features.properties.job import PropertiesJob
    from mmray.features.properties.settings import property_settings
    from mmray.features.properties.view import findings
    from mmray.runs.run import open_run

    say("3 what they mean: properties of the most frequent concepts with controls, heat maps of all", "bold")
    settings = property_settings({"run": str(run), "concepts": concepts, "maps": maps})
    measured = run_job(PropertiesJob(settings))
    for line in findings(open_run(run)):
        say(f"  {line}")
    say(f"  {measured.headline['heatmaps']:,} heat maps, {measured.seconds:.0f} s")
    return measured.complete


def _say_edits(census: CensusSettings, *, quick: bool) -> bool:
    """Edit the demo model, with a control, and print the measures; return as `_run_demo`."""
    from mmray.demo import EVALUATION
    from mmray.features.evaluation.view import comparison
    from mmray.features.pipeline.command import follow_pipeline
    from mmray.features.pipeline.job import pipeline_settings
    from mmray.runs.run import open_run

    # The most frequent concepts have the most reliable rankings.
    source, _, target = list(open_run(census.out).concepts)[:3]
    more = "" if quick else ", the same with random neurons, and what is not there"
    say(f"4 edits: {source} → {target}{more}", "bold")
    common = QUICK_EDIT if quick else EDIT
    swap = {"source": source, "target": target, **common}
    edits = {f"{source}-{target}": swap}
    if not quick:
        edits["random-neurons"] = swap | {"method": "random"}
        edits["truthful"] = {"reduce_hallucination": True, "neurons": 150, **common}
    scenes = QUICK_SCENES if quick else SCENES
    began = time.perf_counter()
    done = follow_pipeline(
        pipeline_settings(
            {
                "census": census.model_dump(exclude_unset=True),
                "edits": edits,
                "evaluation": {
                    "data": str(EVALUATION),
                    "limit": scenes,
                    "shard_size": scenes // 2,
                    "text_count": min(40, scenes // 2),
                    "pope_objects": 0,
                },
            }
        )
    )
    console.print(comparison(done.measures))
    say(f"  on {scenes} other scenes, {time.perf_counter() - began:.0f} s")
    return done.complete


def _say_report(run: Path) -> None:
    """Write the report and print its path."""
    from mmray.report.writing import write_report
    from mmray.runs.run import open_run

    began = time.perf_counter()
    path = write_report(open_run(run))
    say(f"5 report, {time.perf_counter() - began:.0f} s → {path}", "bold")
