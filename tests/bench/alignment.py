"""A LLaVA that sees by another's tower: `python -m tests.bench.alignment --tower CHECKPOINT`.

W is trained from the tower into the model (the demo by default) on rendered scenes, with Ray Train and two workers, of
which one is killed at the first checkpoint. Then object recall, CHAIR and POPE of the joint model next to the
original's, on other scenes.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

from jobs.demo.dataset import write_parquet
from jobs.demo.scenes import World
from mmray.features.alignment.job import run_alignment
from mmray.features.alignment.settings import alignment_settings
from mmray.features.alignment.training import PREFIX
from mmray.storage import open_store
from tests.support.kills import processes

SHOWN = ("recall", "chair_i", "chair_s", "pope_random_f1", "pope_popular_f1", "pope_adversarial_f1")
SEEDS = {"train": 70_001, "validate": 70_002}


def own_workers() -> list[int]:
    """Process numbers of the training's workers that this process started."""
    parents = {pid: (parent, name) for pid, parent, name in processes()}

    def is_own(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid][0]
        return pid == os.getpid()

    return [pid for pid, (_, name) in parents.items() if "RayTrainWorker" in name and is_own(pid)]


def kill_one(out: str, killed: list[int]) -> None:
    """Kill a worker once the first checkpoint is committed."""
    store = open_store(out)
    while not killed:
        time.sleep(0.2)
        workers = own_workers()
        if workers and store.list(PREFIX):
            os.kill(workers[-1], signal.SIGKILL)
            killed.append(workers[-1])
            print(f"worker {workers[-1]} killed after {store.list(PREFIX)[-1].key}", flush=True)


def scenes(folder: Path, name: str, count: int) -> str:
    world, path = World.load(), folder / f"{name}.parquet"
    write_parquet(path, world, world.sample(count, SEEDS[name]), seed=SEEDS[name], english_share=1.0)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or f"{folder}/aligned"
        settings = alignment_settings(
            {
                "tower": arguments.tower,
                "model": arguments.model,
                "data": scenes(Path(folder), "train", arguments.images),
                "validate_on": scenes(Path(folder), "validate", arguments.samples),
                "out": out,
                "hidden": 512,
                "learning_rate": 1e-3,
                "epochs": arguments.epochs,
                "checkpoint_every": 100,
                "workers": 2,
            }
        )
        killed: list[int] = []
        killer = threading.Thread(target=kill_one, args=(out, killed), daemon=True)
        killer.start()
        done = run_alignment(settings)
        print(f"{done.images:,} images in {done.steps:,} steps, loss {done.loss:.4f}; workers killed: {len(killed)}")
        for name in SHOWN:
            row = done.measures[name]
            print(
                f"{name:22s} original {row['before']:.3f}   joint {row['after']:.3f}  "
                f"({row['low']:.3f} to {row['high']:.3f}), n {row['n']}"
            )
        recall = done.measures["recall"]
        print(f"recall, joint / original: {recall['after'] / recall['before']:.3f}; {done.seconds:.0f} s in all")


if __name__ == "__main__":
    main()
