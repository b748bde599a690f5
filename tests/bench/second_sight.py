"""What a detector says of what the model claims, and what the model says of a sight that the detector's gradient moves.

    python -m tests.bench.second_sight --model demo
    python -m tests.bench.second_sight --model CHECKPOINT --detector HEADS

Captions of fresh scenes: AUROC of the detector's confidence in their nouns, beside the model's own
log-probability; the same of yes/no questions. Then yes/no answers before and after moves, beside controls of equal norm.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import mmray
from mmray.cluster.opinions import Looked, run_opinions, run_perturbation
from mmray.demo.dataset import write_parquet
from mmray.demo.scenes import World
from mmray.evaluation.opinions.settings import opinion_settings, perturbation_settings

SEED = 80_001


def fresh(folder: str, count: int) -> str:
    world, path = World.load(), Path(folder) / "fresh.parquet"
    write_parquet(path, world, world.sample(count, SEED), seed=SEED, english_share=1.0)
    return str(path)


def show(done: Looked, name: str, hidden: tuple[str, ...] = ()) -> None:
    print(f"{done.rows:,} {name} of {done.samples:,} scenes, {done.failures} failures, {done.seconds:.0f} s")
    for row in done.measures:
        if row["measure"] in hidden:
            continue
        first = row.get("claims") or row["condition"]
        second = row.get("judge") or row.get("about") or "all"
        value = "–" if row["value"] is None else f"{row['value']:.3f}"
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        print(f"  {first:18s}{second:16s}{row['measure']:18s}{value:>8s}   {interval:18s} n {row['n']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--detector", default="demo")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--moved", type=int, default=60)
    parser.add_argument("--norm", type=float, default=0.8)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--pictures")
    arguments = parser.parse_args()
    common: dict[str, Any] = {"detector": arguments.detector, "workers": arguments.workers}
    with tempfile.TemporaryDirectory() as folder:
        data = fresh(folder, max(arguments.scenes, arguments.moved))
        run = mmray.run_census(arguments.model, data, f"{folder}/run", limit=4, workers="1")
        done = run_opinions(opinion_settings({"run": run.uri, "data": data, "limit": arguments.scenes, **common}))
        show(done, "claims", ("reliability",))
        mistakes = run.table("mistakes").to_pylist()
        for row in mistakes[:8]:
            print(f"  claimed {row['word']}, there stands {row['mistaken_for'] or 'nothing'}: {row['text']}")
        if arguments.pictures:
            for number, row in enumerate(mistakes):
                Path(arguments.pictures, f"{number:03d}-{row['word']}.png").write_bytes(row["picture"])
        asked = {"model": arguments.model, "data": data, "out": f"{folder}/moved", "limit": arguments.moved}
        moved = run_perturbation(perturbation_settings({**asked, "norm": arguments.norm, "shard_size": 5, **common}))
        show(moved, "answers", ("shift",))


if __name__ == "__main__":
    main()
