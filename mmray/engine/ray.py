"""Run units on the actors of a Ray cluster: one model replica per actor, on its own GPU or GPUs, or on CPU cores."""

from __future__ import annotations

import gc
import os
import sys
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
from ray import cloudpickle

from mmray.engine.executors import Work
from mmray.engine.session import actor_pool, machines, ray_session
from mmray.engine.units import Node, UnitOutcome, UnitRunner, WorkOrder

MOST_TASKS = 1000
"""Tasks per job: each costs Ray Data's driver milliseconds and kilobytes, so that many units share tasks."""
TASKS_PER_WORKER = 50
"""Tasks per worker at least, if there are enough units; with fewer, some workers would idle at the end."""
OVERLAPPED_FROM = 4
"""Tasks per worker from which an actor gets a second one early, to work on while it commits the first."""


class RayExecutor:
    """Hands units to a pool of actors through Ray Data."""

    def __init__(self, workers: tuple[int, int] | None, gpus_per_worker: float | None, address: str | None) -> None:
        self.workers = workers
        self.gpus_per_worker = gpus_per_worker
        self.address = address

    def session(self) -> AbstractContextManager[None]:
        """Join the cluster, or start a local Ray that ends with the block."""
        return ray_session(self.address)

    def run(self, order: WorkOrder, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[UnitOutcome]]:
        """Yield the outcomes of each task (one or more groups) as it finishes."""
        yield from self.run_side_by_side([(order, groups)])

    def run_side_by_side(self, work: Sequence[Work]) -> Iterator[Sequence[UnitOutcome]]:
        """Yield the outcomes of several work orders, whose pools of actors run at the same time."""
        first, *others = [self._dataset(order, groups, len(work)) for order, groups in work]
        # One execution for all of them: Ray Data gives each pool the resources that the others leave.
        outcomes = first.union(*others) if others else first
        for batch in outcomes.iter_batches(batch_size=None, prefetch_batches=0):
            rows = zip(*(batch[name].tolist() for name in batch), strict=True)
            yield [UnitOutcome(**dict(zip(batch, row, strict=True))) for row in rows]

    def _dataset(self, order: WorkOrder, groups: Sequence[Sequence[int]], orders: int) -> ray.data.Dataset:
        """Return the lazy outcomes of a work order, which starts with an equal share of the actors that fit."""
        pool = actor_pool(self.workers, self.gpus_per_worker, machines(), len(groups))
        tasks = _tasks(groups, max(MOST_TASKS, TASKS_PER_WORKER * pool.most))
        # With few units of different sizes, a queue per actor would give one actor several large ones and another none.
        calls = 2 if len(tasks) >= OVERLAPPED_FROM * pool.most and all(job.overlaps for job in order.jobs) else 1
        return ray.data.from_blocks([pa.table({"unit": numbers}) for numbers in tasks]).map_batches(
            _Actor,
            fn_constructor_args=(cloudpickle.dumps(order), pool.threads, str(Path.cwd())),
            batch_size=1,
            # No task waits for an actor: rows hold only numbers and outcomes, so nothing needs prefetching.
            compute=ray.data.ActorPoolStrategy(
                min_size=max(1, pool.workers // orders),
                max_size=pool.most,
                max_tasks_in_flight_per_actor=calls,
                max_concurrent_calls_per_actor=calls,
                enable_true_multi_threading=calls > 1,
            ),
            num_cpus=pool.cores,
            num_gpus=pool.gpus or None,
        )


def _tasks(groups: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Return the units of each task: one group, or several if there are more than `most` groups."""
    each = -(-len(groups) // most)
    return [list(chain(*groups[start : start + each])) for start in range(0, len(groups), each)]


class _RayNode(Node):
    """The cluster node of this actor."""

    def __init__(self) -> None:
        self.name = ray.get_runtime_context().get_node_id()

    def is_alive(self, name: str) -> bool:
        """Return whether a node is still in the cluster."""
        return any(node["NodeID"] == name and node["Alive"] for node in ray.nodes())

    def stop(self) -> None:
        """End the actor; Ray replaces it."""
        # Nothing else stops native code that hangs, and an exception would wait for it.
        os._exit(1)


class _Actor:
    """Runs batches of units, in one thread or in two; outcomes are columns, as Ray Data expects."""

    def __init__(self, order: bytes, threads: int, home: str) -> None:
        # Unpickled here, because that imports torch and transformers: without collections, in a fifth less time.
        gc.disable()
        unpickled: WorkOrder = cloudpickle.loads(order)
        gc.enable()
        # Workers start in a folder of Ray's, but relative paths are relative to the driver's folder.
        if Path(home).is_dir():
            os.chdir(home)
        # The pool's share of cores; Ray itself only knows what it reserves for the actor. A job without a model has no
        # torch, whose import takes seconds.
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.runner = UnitRunner(unpickled, _RayNode())

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        outcomes = [asdict(self.runner.run(int(number))) for number in batch["unit"]]
        return {name: [outcome[name] for outcome in outcomes] for name in outcomes[0]}
