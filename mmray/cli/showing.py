"""The last steps of the demo: what the neurons mean, edits, and the report, each said in a few lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mmray.features.census.settings import CensusSettings
from mmray.terminal.options import console, plural, say

if TYPE_CHECKING:
    from mmray.features.census.job import Outcome

EDIT, QUICK_EDIT = {"kept": 256, "samples": 16}, {"kept": 64, "samples": 8, "steps": 30}
"""Of the demo's edits, what they are learnt on."""
SCENES, QUICK_SCENES = 64, 24
"""That the demo's edits are measured on."""


def say_shortfall(outcome: Outcome) -> None:
    """Say how many samples of a census were skipped or failed, where any were."""
    from mmray.features.census.view import skipped

    for line in skipped(outcome.skipped, outcome.analysed):
        say(f"{line}; see --nouns")
    if outcome.failures:
        say(f"{plural(outcome.failures, 'sample')} failed; see: mmray status {outcome.out}", "yellow")


def say_meaning(run: Path, concepts: int, maps: int) -> bool:
    """Draw heat maps of all concepts, measure the most frequent, and say what that shows; True where all went well."""
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


def say_edits(census: CensusSettings, *, quick: bool) -> bool:
    """Edit the demo and say what that did, with a control; True where all went well."""
    from mmray.demo import EVALUATION
    from mmray.features.evaluation.view import comparison
    from mmray.features.pipeline.command import follow_pipeline
    from mmray.features.pipeline.job import pipeline_settings
    from mmray.runs.run import open_run

    source, _, target = list(open_run(census.out).concepts)[:3]
    say(
        f"4 edits: {source} → {target}, the same with random neurons" + ("" if quick else ", and what is not there"),
        "bold",
    )
    made = QUICK_EDIT if quick else EDIT
    swap = {"source": source, "target": target, **made}
    edits = {f"{source}-{target}": swap, "random-neurons": swap | {"method": "random"}}
    if not quick:
        edits["truthful"] = {"reduce_hallucination": True, "neurons": 150, **made}
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
                    "text_count": min(40, scenes),
                    "pope_objects": 0,
                },
            }
        )
    )
    console.print(comparison(done.measures))
    say(f"  on {scenes} other scenes, {time.perf_counter() - began:.0f} s")
    return done.complete


def say_report(run: Path) -> None:
    """Write the report, and say where it is."""
    from mmray.report.writing import write_report
    from mmray.runs.run import open_run

    began = time.perf_counter()
    place = write_report(open_run(run))
    say(f"5 report, {time.perf_counter() - began:.0f} s → {place}", "bold")
