"""The driver of a census: fix the shards, hand them to actors, follow what is committed, merge, rank."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import ray
import ray.data

from mmray.cluster.session import ray_session, resources
from mmray.cluster.worker import DECODE, DECODED, CensusWorker, open_data
from mmray.datasets.contents import Source
from mmray.datasets.shards import Manifest, cut
from mmray.errors import InputError
from mmray.models.loading import describe_model, digest, resolve
from mmray.neurons.concepts import NounSource, noun_source
from mmray.neurons.merging import RunMerge
from mmray.neurons.planning import estimate
from mmray.results.plan import Plan
from mmray.runs import RunFolder, check_same
from mmray.settings import CensusSettings
from mmray.storage import check_writable, open_store
from mmray.tables import from_bytes, write_table
from mmray.version import VERSION


@dataclass(frozen=True)
class Progress:
    """How far a census is; counts cover all shards that are committed or set aside, of this and earlier calls."""

    samples: int
    total: int
    failures: int
    shards_aside: int


@dataclass(frozen=True)
class Outcome:
    """What a finished census amounts to."""

    out: str
    samples: int
    failures: int
    shards_aside: dict[int, str]
    seconds: float

    @property
    def complete(self) -> bool:
        """Tell whether every sample was analysed."""
        return not self.failures and not self.shards_aside


def run_census(settings: CensusSettings, follow: Callable[[Progress], None] = lambda _: None) -> Outcome:
    """Run a census to its end, or go on with one that stopped, and return what it amounts to.

    `follow` hears of every committed shard. Raises InputError for anything wrong with the set-up, before any work.
    """
    began = time.perf_counter()
    store = open_store(settings.out)
    folder = RunFolder(store)
    source = open_data(settings)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: no sample in it")
    vocabulary = source.objects_vocabulary() if settings.nouns in ("auto", "objects") else ()
    nouns = noun_source(settings.nouns, vocabulary, source.translations())
    info = run_info(settings, source, manifest, nouns)
    before = folder.info()
    if before is not None:
        check_same(before, info, settings.out)
    else:
        check_writable(store)
        folder.begin(info, manifest.to_json())
        check_same(folder.info() or info, info, settings.out)
    _work(settings, folder, manifest, nouns, follow)
    return _conclude(settings, folder, info, began)


def plan_census(settings: CensusSettings) -> Plan:
    """Return what the census would cost, without running it."""
    source = open_data(settings)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: no sample in it")
    vocabulary = source.objects_vocabulary() if settings.nouns in ("auto", "objects") else ()
    nouns = noun_source(settings.nouns, vocabulary, source.translations())
    facts = describe_model(settings.model, trust_remote_code=settings.trust_remote_code)
    return estimate(settings, source, manifest, nouns, facts["widths"], facts["parameters"], facts["image_tokens"])


def run_info(settings: CensusSettings, source: Source, manifest: Manifest, nouns: NounSource) -> dict[str, Any]:
    """Return what run.json says: settings, fingerprint, versions, model parts, data digest."""
    folder = resolve(settings.model)
    digests = {"model": digest(folder), "data": manifest.digest, "nouns": nouns.digest()}
    return {
        "settings": settings.model_dump(exclude={"address"}),
        "result_settings": settings.result_settings(),
        "digests": digests,
        "fingerprint": settings.fingerprint(**digests),
        "model": describe_model(settings.model, trust_remote_code=settings.trust_remote_code),
        "data": {"kind": source.kind, "columns": source.columns.model_dump(), "samples": manifest.samples},
        "shards": len(manifest.shards),
        "nouns": nouns.kind,
        "versions": {"mmray": VERSION, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "ray", "pyarrow")},
    }


def _work(
    settings: CensusSettings,
    folder: RunFolder,
    manifest: Manifest,
    nouns: NounSource,
    follow: Callable[[Progress], None],
) -> None:
    """Have every shard that is neither committed nor set aside analysed."""
    done = folder.receipts() | folder.aside()
    units = [shard.shard_id for shard in manifest.shards if shard.shard_id not in done]
    if not folder.store.exists(DECODED):
        units.insert(0, DECODE)
    finished = list(done.values())
    samples, failures = sum(r.samples for r in finished), sum(r.failures for r in finished)
    aside = sum(r.reason is not None for r in finished)
    follow(Progress(samples, manifest.samples, failures, aside))
    if not units:
        return
    with ray_session(settings.address):
        for receipt in _actors(settings, nouns, units).iter_rows():
            samples += receipt["samples"]
            failures += receipt["failures"]
            aside += bool(receipt["reason"])
            follow(Progress(samples, manifest.samples, failures, aside))


def _actors(settings: CensusSettings, nouns: NounSource, units: list[int]) -> ray.data.Dataset:
    """Return the receipts to come: the units of work, one a block, mapped over a pool of actors."""
    cores, gpus = resources()
    gpus_each = settings.gpus_per_worker if settings.gpus_per_worker is not None else float(gpus > 0)
    if gpus_each and not gpus:
        raise InputError(f"--gpus-per-worker {gpus_each:g}: the cluster has no GPU")
    # Without GPUs, single-threaded workers beat one worker with as many threads.
    workers = settings.workers or (max(1, int(gpus / gpus_each)) if gpus_each else max(1, min(int(cores), 4)))
    workers = min(workers, len(units))
    # Without GPUs the workers share the cores; an actor may ask for a part of one.
    cores_each = 1.0 if gpus_each else cores / workers
    return ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        CensusWorker,
        fn_constructor_args=(settings, nouns, max(1, int(cores_each)) if not gpus_each else 4),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=min(1.0, cores_each) if gpus_each else cores_each,
        num_gpus=gpus_each or None,
    )


def _conclude(settings: CensusSettings, folder: RunFolder, info: dict[str, Any], began: float) -> Outcome:
    """Merge what is committed into the tables."""
    receipts, aside = folder.receipts(), folder.aside()
    merge = RunMerge(info["model"]["widths"], from_bytes(folder.store.read(DECODED)), settings.top_k)
    appended: dict[str, list[Any]] = {}
    for receipt in receipts.values():
        for name, rows in merge.add(partial(folder.read_part, receipt)).items():
            appended.setdefault(name, []).append(rows)
    for name, parts in appended.items():
        write_table(folder.store, name, parts)
    for name, table in merge.tables():
        write_table(folder.store, name, [table])
    outcome = Outcome(
        out=settings.out,
        samples=sum(receipt.samples for receipt in receipts.values()),
        failures=sum(receipt.failures for receipt in receipts.values()),
        shards_aside={number: receipt.reason or "" for number, receipt in aside.items()},
        seconds=time.perf_counter() - began,
    )
    folder.finish(
        {
            "samples": outcome.samples,
            "failures": outcome.failures,
            "shards_aside": json.loads(json.dumps(outcome.shards_aside)),
            "occurrences": sum(receipt.occurrences for receipt in receipts.values()),
            "concepts": len(merge.concepts.concepts),
            "compute_seconds": round(sum(receipt.seconds for receipt in receipts.values()), 3),
        }
    )
    return outcome
