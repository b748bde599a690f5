"""A Ray of several nodes, drivers that are cheap to start again, and a killer that strikes while they work."""

import logging
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmray.engine import driver as engine_driver
from mmray.engine import units as engine_units
from mmray.engine.units import UnitRunner, WorkOrder
from mmray.features.census import inputs, job
from mmray.features.census.settings import census_settings
from mmray.features.census.tables import PARTS
from mmray.neurons.concepts import NounSource
from mmray.runs import RunFolder
from mmray.runs import driver as runs_driver
from mmray.storage import Entry, Store, open_store
from tests.support.broken_stores import Appended, ReceiptFirst
from tests.support.forked_workers import FORK
from tests.support.stores import Wrapped

PAUSES = {".parquet": 0.06, ".json": 0.25}
"""Seconds before each part of a shard and before its receipt: as if it were a large model's."""


class Slow(Wrapped):
    """A store whose commits take their time, so that kills find them under way."""

    def commit(self, key: str, data: bytes) -> bool:
        if key.startswith(("shards/", "receipts/")):
            time.sleep(PAUSES[Path(key).suffix])
        return super().commit(key, data)


class OneAfterTheOther(RunFolder):
    """Commits the parts of a shard slowly and in order, and is otherwise as it is."""

    @classmethod
    def at(cls, uri: Path | str) -> RunFolder:
        found = RunFolder.at(uri)
        return cls(Slow(found.store))


class SlowReceiptFirst(OneAfterTheOther, ReceiptFirst):
    """The same with the receipt first."""


class SlowAppended(OneAfterTheOther, Appended):
    """The same with whatever is there read."""


KINDS: dict[str, type[RunFolder]] = {
    "sound": OneAfterTheOther,
    "receipt first": SlowReceiptFirst,
    "appended": SlowAppended,
}


@dataclass(frozen=True)
class Bearer(NounSource):
    """Nouns that bring a kind of folder to every worker."""

    folder: str = "sound"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        engine_units.RunFolder = KINDS[self.folder]  # type: ignore[misc]


class Unleased:
    """Stands for a lease where none is held: it is never lost."""

    number = 1

    def check(self) -> None:
        """Find nothing wrong."""

    def guard(self, store: Store) -> Store:
        """Return the store as it is."""
        return store


def drive(settings: dict[str, Any], kind: str, leased: bool, environment: dict[str, str]) -> None:
    """Run a census to its end in this process, which is a driver and nothing else; without a lease if so told."""
    # The server that this process is a fork of may have been started before there was a bucket.
    os.environ.update(environment)
    logging.disable(logging.ERROR)
    made: Callable[..., NounSource] = inputs.noun_source
    nouns = patch.object(inputs, "noun_source", lambda *given: Bearer(**vars(made(*given)), folder=kind))
    held = engine_driver.drive_analysis if leased else lambda _: nullcontext(Unleased())
    with nouns, folders_of(KINDS[kind]), patch.object(engine_driver, "drive_analysis", held):
        outcome = job.run_census(census_settings(settings))
    raise SystemExit(0 if outcome.complete else 4)


@contextmanager
def folders_of(kind: type[RunFolder]) -> Iterator[None]:
    """Have driver and workers of this process open folders of this kind."""
    with ExitStack() as stack:
        for module in (engine_driver, engine_units, runs_driver, job):
            stack.enter_context(patch.object(module, "RunFolder", kind))
        yield


def work(settings: dict[str, Any], unit: int) -> None:
    """Be a worker without Ray, for one unit of work of a census that has begun."""
    census = job.CensusJob(census_settings(settings))
    plan, fingerprint = census.plan(), RunFolder.at(census.root).info()
    assert fingerprint is not None
    order = WorkOrder([census], [plan.context], [plan.units], [census.root], [fingerprint["fingerprint"]])
    with folders_of(OneAfterTheOther):
        UnitRunner(order).run(unit)


def cheap_processes() -> Any:
    """Return a context whose processes have everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.kills", "ray.data", "transformers"])
    return context


def within_a_commit(store: Store) -> bool:
    """Return whether a shard has some of its parts and not yet all that belongs to it."""
    found: dict[str, int] = {}
    for entry in [*store.list("shards/"), *store.list("receipts/")]:
        shard = entry.key.split("/")[1].removesuffix(".json")
        found[shard] = found.get(shard, 0) + 1
    return any(1 < count < len(PARTS) for count in found.values())  # all but `decoded`, and the receipt


@contextmanager
def cluster(cores: int) -> Iterator["Cluster"]:
    """Start a Ray of a head without cores and two nodes with so many each."""
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [nodes.add_node(num_cpus=cores) for _ in range(2)]
    try:
        yield Cluster(nodes, workers, cores)
    finally:
        nodes.shutdown()


@dataclass
class Cluster:
    """Nodes of a Ray, and what of it can be killed."""

    nodes: Any
    workers: list[Any]
    cores: int

    @property
    def address(self) -> str:
        return str(self.nodes.address)

    def actors(self) -> dict[int, int]:
        """Process numbers of the census's actors, each with the index of its node."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.workers]
        found = [(pid, parent) for pid, parent, name in processes() if parent in raylets and "_Actor" in name]
        return {pid: raylets.index(parent) for pid, parent in found}

    def replace_node(self, number: int) -> None:
        """Remove a node with all that runs there, and add another."""
        self.nodes.remove_node(self.workers.pop(number), allow_graceful=False)
        self.workers.append(self.nodes.add_node(num_cpus=self.cores))


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield number, parent and command line of every process; a forked worker's parent is who asked for it."""
    found: dict[int, tuple[int, str]] = {}
    forks: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, state = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            parent = int(state.split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        if name.startswith(FORK):
            forks[int(name.removeprefix(FORK))] = parent
    for number, (parent, line) in found.items():
        yield number, forks.get(number, parent), line


@dataclass
class Killer:
    """Kills what it is told to while a census is at work, and has driver after driver finish it."""

    ray: Cluster
    settings: dict[str, Any]
    kind: str = "sound"
    seed: int = 0
    leased: bool = True
    killed: list[str] = field(default_factory=list)
    committed: dict[str, bytes] = field(default_factory=dict)
    """Receipts that there were when a driver was killed."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.context = cheap_processes()
        self.store: Store = open_store(self.settings["out"])
        self.driver = self.start()

    def start(self) -> BaseProcess:
        driver = self.context.Process(
            target=drive,
            args=(self.settings | {"address": self.ray.address}, self.kind, self.leased, dict(os.environ)),
        )
        driver.start()
        return driver

    def receipts(self) -> list[Entry]:
        return self.store.list("receipts/")

    def within_a_commit(self) -> bool:
        return within_a_commit(self.store)

    def wait(self, for_what: Callable[[], bool], seconds: float = 120.0, *, every: float = 0.15) -> None:
        """Look every so many seconds; each look lists the store, or all processes of the machine."""
        until = time.monotonic() + seconds
        while not for_what():
            assert self.driver.is_alive(), f"driver ended with {self.driver.exitcode} after {self.killed}"
            assert time.monotonic() < until, f"nothing happens after {self.killed}"
            time.sleep(every)

    def strike(self, what: str, done: int, *, in_commit: bool = False) -> None:
        """Kill an actor or all, the driver or a node, once so many shards are committed, a random moment later."""
        self.wait(lambda: len(self.receipts()) >= done and bool(self.ray.actors()))
        if in_commit:
            self.wait(self.within_a_commit, every=0.02)
        else:
            time.sleep(self.random.uniform(0, 0.6))
        if what == "actor":
            self.wait(lambda: bool(self.ray.actors()))
            os.kill(self.random.choice(list(self.ray.actors())), signal.SIGKILL)
        elif what == "actors":
            for pid in self.ray.actors():
                os.kill(pid, signal.SIGKILL)
        elif what == "driver":
            assert self.driver.is_alive(), "the driver ended before it could be killed"
            self.driver.kill()
            self.driver.join()
            self.committed |= {entry.key: self.store.read(entry.key) for entry in self.receipts()}
            self.driver = self.start()
        else:
            self.ray.replace_node(self.random.randrange(len(self.ray.workers)))
        self.killed.append(what)

    def finish(self) -> None:
        """Let the last driver finish."""
        self.driver.join(240)
        assert self.driver.exitcode == 0, f"driver ended with {self.driver.exitcode} after {self.killed}"

    def end(self) -> None:
        """End what runs yet."""
        if self.driver.is_alive():
            self.driver.kill()
        self.driver.join()
