"""The last steps of the demo: what the neurons mean, and the report, each said in a line or two."""

from __future__ import annotations

import time
from pathlib import Path

from mmray.cli.options import say


def say_meaning(run: Path, concepts: int, maps: int) -> bool:
    """Draw heat maps of all concepts, measure the most frequent, and say what that shows; True where all went well."""
    from mmray.cluster.properties import run_properties
    from mmray.evaluation.properties.settings import property_settings
    from mmray.results.properties import findings
    from mmray.results.run import open_run

    say("3 what they mean: properties of the most frequent concepts beside controls, heat maps of all", "bold")
    measured = run_properties(property_settings({"run": str(run), "concepts": concepts, "maps": maps}))
    for line in findings(open_run(run)):
        say(f"  {line}")
    say(f"  {measured.heatmaps:,} heat maps, {measured.seconds:.0f} s")
    return measured.complete


def say_report(run: Path) -> None:
    """Write the report, and say where it is."""
    from mmray.reporting import write_report
    from mmray.results.run import open_run

    began = time.perf_counter()
    place = write_report(open_run(run))
    say(f"4 report, {time.perf_counter() - began:.0f} s → {place}", "bold")
