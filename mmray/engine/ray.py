"""Units on the actors of a Ray cluster: one model replica per actor, on its own GPU or GPUs, or on CPU cores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from mmray.engine.executors import Work
from mmray.engine.session import actor_pool, machines, ray_session
from mmray.engine.units import Answer, Node, UnitRunner, WorkOrder

MOST_TASKS = 1000
"""Tasks that Ray Data is given: each costs its driver milliseconds and kilobytes. Of more units, some share one."""
TASKS_PER_WORKER = 50
"""Tasks that each worker has at least, where there are so many units: fewer leave some idle in the end."""


class RayExecutor:
    """Hands units to a pool of actors through Ray Data."""

    def __init__(self, workers: tuple[int, int] | None, gpus_per_worker: float | None, address: str | None) -> None:
        self.workers = workers
        self.gpus_per_worker = gpus_per_worker
        self.address = address

    def session(self) -> AbstractContextManager[None]:
        """Join the cluster, or start a local Ray that ends with the block."""
        return ray_session(self.address)

    def answers(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[Answer]]:
        """Yield the answers of each task, a group or a few, as its actor has done it."""
        yield from self.side_by_side([(order, groups)])

    def side_by_side(self, work: Sequence[Work]) -> Iterator[Sequence[Answer]]:
        """Yield the answers of several orders, whose pools of actors run at the same time."""
        first, *others = [self._dataset(order, groups, len(work)) for order, groups in work]
        # One execution of all: Ray Data gives each pool what the others leave.
        together = first.union(*others) if others else first
        for batch in together.iter_batches(batch_size=None, prefetch_batches=0):
            rows = zip(*(batch[name].tolist() for name in batch), strict=True)
            yield [Answer(**dict(zip(batch, row, strict=True))) for row in rows]

    def _dataset(self, order: WorkOrder, groups: Sequence[Sequence[int]], orders: int) -> ray.data.Dataset:
        """Return the answers of an order, still to be computed by an equal part of the actors that fit."""
        pool = actor_pool(self.workers, self.gpus_per_worker, machines(), len(groups))
        tasks = _tasks(groups, max(MOST_TASKS, TASKS_PER_WORKER * pool.most))
        return ray.data.from_blocks([pa.table({"unit": numbers}) for numbers in tasks]).map_batches(
            _Actor,
            fn_constructor_args=(order, pool.threads, str(Path.cwd())),
            batch_size=1,
            # What waits is a number, and what comes back an answer: neither fills the object store. Nothing is fetched
            # ahead: with few and unlike units one actor would have several of the large ones, and another none.
            compute=ray.data.ActorPoolStrategy(
                min_size=max(1, pool.workers // orders), max_size=pool.most, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=pool.cores,
            num_gpus=pool.gpus or None,
        )


def _tasks(groups: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Return the units of each task: those of one group, or of a few where there are more than `most` groups."""
    each = -(-len(groups) // most)
    return [list(chain(*groups[start : start + each])) for start in range(0, len(groups), each)]


class _RayNode(Node):
    """The node of the cluster that this actor lives on."""

    def __init__(self) -> None:
        self.name = ray.get_runtime_context().get_node_id()

    def is_alive(self, name: str) -> bool:
        """Return whether a node is still in the cluster."""
        return any(node["NodeID"] == name and node["Alive"] for node in ray.nodes())

    def stop(self) -> None:
        """End the actor, which Ray replaces: native code that hangs can't be interrupted otherwise."""
        os._exit(1)


class _Actor:
    """Answers batches of units, in columns as Ray Data has them."""

    def __init__(self, order: WorkOrder, threads: int, home: str) -> None:
        import torch

        # A cluster's workers start elsewhere: relative paths are the driver's.
        if Path(home).is_dir():
            os.chdir(home)
        torch.set_num_threads(threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.runner = UnitRunner(order, _RayNode())

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        answers = [asdict(self.runner.run(int(number))) for number in batch["unit"]]
        return {name: [answer[name] for answer in answers] for name in answers[0]}
