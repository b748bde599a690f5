"""What the demo's neurons mean, in the figures that matter: `python -m tests.bench.properties [RUN]`.

English concepts with five or more images: how many are written by one of their ten highest neurons, what zeroing their
hundred highest does to the noun and to others, how often heat maps peak on the object in scenes of several; each with
its controls, with 95 % bootstrap intervals over images (of hit rates: over concepts). Then seconds and bytes.

Without RUN a census of the demo is made first. Properties that RUN has already are measured again only where asked
settings differ.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import mmray
from mmray.engine import run as run_job
from mmray.features.properties.job import PropertiesJob
from mmray.features.properties.settings import property_settings
from mmray.report.writing import write_report
from mmray.runs.run import Run

FIGURES = (
    ("sensitivity", "lemma_hit_rate", 10, ("score", "specific", "layer-matched", "uniform")),
    ("causal", "zeroed_own", 100, ("score", "specific", "layer-matched", "activation-matched", "uniform")),
    ("causal", "zeroed_other", 100, ("score", "specific", "layer-matched", "activation-matched", "uniform")),
    ("causal", "zeroed_removed", 100, ("score", "layer-matched")),
    ("causal", "zeroed_kept", 100, ("score", "layer-matched")),
    ("causal", "zeroed_perplexity", 100, ("score", "layer-matched")),
    ("specificity", "auroc", 10, ("score", "specific", "layer-matched")),
    ("region_invariance", "overlap", 10, ("contribution", "other images")),
    ("image_invariance", "jaccard", 10, ("contribution", "other nouns")),
    ("localisation", "pointing_game", 10, ("score", "specific", "unsigned", "gate", "layer-matched", "chance")),
    ("localisation", "iou", 10, ("score", "specific", "unsigned", "gate", "layer-matched")),
    *(
        (
            "comparison",
            measure,
            size,
            ("contribution", "folded", "specific", "gate", "activation", "gradient", "random"),
        )
        for measure, size in (("lemma_hit_rate", 10), ("zeroed_own", 100), ("zeroed_other", 100), ("jaccard", 10))
    ),
)


def show(run: Run) -> None:
    """Print every figure with its interval, and the ratios that follow from them."""
    rows = {
        (row["property"], row["measure"], row["neurons"], row["method"]): row for row in run.properties().to_pylist()
    }
    for group, measure, size, methods in FIGURES:
        print(f"{group} · {measure} · {size} neurons")
        for method in methods:
            if row := rows.get((group, measure, size, method)):
                print(f"  {method:20s}{row['value']:8.3f}   {row['low']:.3f} to {row['high']:.3f}   n {row['n']}")

    def value(group: str, measure: str, size: int, method: str) -> float:
        return rows[group, measure, size, method]["value"]

    for method in ("score", "specific"):
        own, other = (value("causal", f"zeroed_{part}", 100, method) for part in ("own", "other"))
        print(f"own noun's fall / |other nouns' fall|, {method}: {own / max(abs(other), 1e-9):.0f}")
    best = max(value("localisation", "pointing_game", 10, method) for method in ("score", "specific"))
    print(f"pointing game / chance, the better map: {best / value('localisation', 'pointing_game', 10, 'chance'):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?")
    parser.add_argument("--language", default="en")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.run or str(mmray.census("demo", "demo", f"{folder}/run").uri)
        done = run_job(PropertiesJob(property_settings({"run": place, "language": arguments.language})))
        run = mmray.open_run(place)
        show(run)
        began = time.perf_counter()
        report = Path(write_report(run, f"{folder}/report.html"))
        seconds, size = time.perf_counter() - began, report.stat().st_size / 1e6
    counts = f"{done.headline['concepts']} concepts, {done.headline['heatmaps']} heat maps"
    print(f"properties of {counts}: {done.seconds:.0f} s")
    print(f"report: {seconds:.1f} s, {size:.1f} MB")


if __name__ == "__main__":
    main()
