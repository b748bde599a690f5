"""What a detector says of what the model claims, and what the model says of a sight that the detector's gradient moves.

    python -m tests.bench.second_sight --model demo
    python -m tests.bench.second_sight --model CHECKPOINT --detector HEADS

Captions of fresh scenes: AUROC of the detector's confidence in their nouns, next to the model's own log-probability;
the same of yes/no questions. Then yes/no answers before and after moves, with controls of equal norm, and scenes in
which the object really is another.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image

import mmray
from jobs.demo.dataset import write_parquet
from jobs.demo.scenes import World
from mmray.detector.vision_tower import OwnTower
from mmray.engine import JobResult
from mmray.engine import run as run_job
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.features.evaluation.queries import Query
from mmray.features.hallucination.job import HallucinationJob
from mmray.features.hallucination.perturb_job import PerturbJob
from mmray.features.hallucination.settings import hallucination_settings, perturbation_settings
from mmray.models.prompting import prompt_text
from mmray.neurons.model import load_model
from mmray.objects.answers import value_of
from mmray.objects.prompts import presence
from mmray.runs.tables import read_table
from mmray.storage import open_store

SEED = 80_001


def fresh(folder: str, count: int) -> str:
    world, path = World.load(), Path(folder) / "fresh.parquet"
    write_parquet(path, world, world.sample(count, SEED), seed=SEED, english_share=1.0)
    return str(path)


def show(done: JobResult, name: str, hidden: tuple[str, ...] = ()) -> None:
    print(f"{done.headline['rows']:,} {name} of {done.done:,} scenes, {done.failures} failures, {done.seconds:.0f} s")
    for row in done.headline["measures"]:
        if row["measure"] in hidden:
            continue
        first = row.get("claims") or row["condition"]
        second = row.get("judge") or row.get("about") or "all"
        value = "–" if row["value"] is None else f"{row['value']:.3f}"
        interval = "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
        print(f"  {first:18s}{second:16s}{row['measure']:18s}{value:>8s}   {interval:18s} n {row['n']}", flush=True)


def replaced(model_name: str, data: str, out: str) -> str:
    """Ask about scenes in which the source really is exchanged for the target: what a perfect move would reach."""
    before = BaselineReplies(load_model(model_name), 24)
    answers = read_table(open_store(out), "answers").to_pylist()
    value = {(row["sample_id"], row["condition"], row["about"]): row["value"] for row in answers}
    moves = {row["sample_id"]: (row["source"], row["target"]) for row in answers}
    follows, reached, norms = [], [], []
    tower, world = OwnTower(before.model), World.load()
    names = pq.read_table(data, columns=["sample_id"])["sample_id"].to_pylist()
    scenes = dict(zip(names, world.sample(len(names), SEED), strict=True))
    for sample, (source, target) in moves.items():
        scene = scenes[sample]
        other = replace(scene, objects=tuple(target if name == source else name for name in scene.objects))
        images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in world.render([scene, other])]
        with torch.no_grad():
            seen = [tower(tower.pixels([image])) for image in images]
        norms.append(float((seen[1] - seen[0]).norm() / seen[0].norm()))
        queries = [
            Query(sample, prompt_text(before.model, presence(name), None), images[1]) for name in (source, target)
        ]
        texts = [before.verifier.text(tokens) for tokens in before.verifier.generate(queries)]
        for about, right, text in zip(("source", "target"), (1.0, 0.0), texts, strict=True):
            if value[sample, "original", about] == right:
                follows.append(value_of(text, "yes_no") == 1 - right)
                if follows[-1]:
                    reached.append(value[sample, "steps", about] == 1 - right)
    return (
        f"really exchanged: {sum(follows) / len(follows):.3f} of {len(follows)} answers follow, relative norm "
        f"{sum(norms) / len(norms):.3f}; of those the moved follow in {sum(reached) / max(len(reached), 1):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--detector", default="demo")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--moved", type=int, default=60)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--pictures")
    parser.add_argument("--all", action="store_true", help="show every measure")
    arguments = parser.parse_args()
    common: dict[str, Any] = {"detector": arguments.detector, "workers": arguments.workers}
    with tempfile.TemporaryDirectory() as folder:
        data = fresh(folder, max(arguments.scenes, arguments.moved))
        run = mmray.census(arguments.model, data, f"{folder}/run", limit=4, workers="1")
        settings = hallucination_settings({"run": run.uri, "data": data, "limit": arguments.scenes, **common})
        done = run_job(HallucinationJob(settings))
        show(done, "claims", ("reliability",))
        mistakes = run.table("mistakes").to_pylist()
        for row in mistakes[:8]:
            print(f"  claimed {row['word']}, there stands {row['mistaken_for'] or 'nothing'}: {row['text']}")
        if arguments.pictures:
            for number, row in enumerate(mistakes):
                Path(arguments.pictures, f"{number:03d}-{row['word']}.png").write_bytes(row["picture"])
        asked = {"model": arguments.model, "data": data, "out": f"{folder}/moved", "limit": arguments.moved}
        moved = run_job(PerturbJob(perturbation_settings({**asked, "shard_size": 5, **common})))
        show(moved, "answers", ("shift",) if arguments.all else ("shift", "unparsable", "relative_norm"))
        print(f"  {replaced(arguments.model, data, f'{folder}/moved')}")


if __name__ == "__main__":
    main()
