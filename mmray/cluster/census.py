"""The driver of a census: fix the shards, hand them to actors, follow what is committed, merge, rank."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.data

from mmray.cluster.session import actor_pool, machines, ray_session
from mmray.cluster.worker import DECODE, DECODED, CensusWorker, open_data
from mmray.datasets.contents import Source
from mmray.datasets.shards import Manifest, cut
from mmray.errors import InputError
from mmray.models.loading import describe_model, digest, resolve
from mmray.neurons.concepts import NounSource, noun_source
from mmray.neurons.merging import APPENDED, RunMerge
from mmray.neurons.planning import estimate
from mmray.results.plan import Plan
from mmray.runs import RunFolder
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
    folder = RunFolder(open_store(settings.out))
    source, manifest, nouns = open_input(settings)
    info = run_info(settings, source, manifest, nouns)
    if folder.info() is None:
        check_writable(folder.store)
    folder.begin(info, manifest.to_json())
    if _work(settings, folder, manifest, nouns, follow) or folder.finished() is None:
        _merge(settings, folder, info)
    receipts = folder.receipts()
    return Outcome(
        out=settings.out,
        samples=sum(receipt.samples for receipt in receipts.values()),
        failures=sum(receipt.failures for receipt in receipts.values()),
        shards_aside={number: receipt.reason or "" for number, receipt in folder.aside(receipts).items()},
        seconds=time.perf_counter() - began,
    )


def plan_census(settings: CensusSettings) -> Plan:
    """Return what the census would cost, without running it."""
    source, manifest, nouns = open_input(settings)
    facts = describe_model(settings.model, trust_remote_code=settings.trust_remote_code)
    return estimate(settings, source, manifest, nouns, facts["widths"], facts["parameters"], facts["image_tokens"])


def open_input(settings: CensusSettings) -> tuple[Source, Manifest, NounSource]:
    """Return the data of a census, its cut into shards, and what its nouns are found with."""
    source = open_data(settings)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: no sample in it")
    vocabulary = source.objects_vocabulary() if settings.nouns in ("auto", "objects") else ()
    return source, manifest, noun_source(settings.nouns, vocabulary, source.translations())


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
) -> bool:
    """Have every shard that is neither committed nor set aside analysed; tell whether there was any."""
    done = folder.receipts()
    if not settings.retry_failed:
        done |= folder.aside(done)
    pending = [shard.shard_id for shard in manifest.shards if shard.shard_id not in done]
    units = pending if folder.store.exists(DECODED) else [DECODE, *pending]
    samples, failures = sum(r.samples for r in done.values()), sum(r.failures for r in done.values())
    aside = sum(r.reason is not None for r in done.values())
    follow(Progress(samples, manifest.samples, failures, aside))
    if not units:
        return False
    folder.reopen(pending)
    with ray_session(settings.address):
        # Nothing is fetched ahead: what is committed is told at once, not when the next shard is done too.
        for receipts in _actors(settings, nouns, units).iter_batches(batch_size=None, prefetch_batches=0):
            if problem := next(filter(None, receipts["problem"]), None):
                raise InputError(problem)
            if max(receipts["shard_id"]) == DECODE:
                continue
            samples += int(sum(receipts["samples"]))
            failures += int(sum(receipts["failures"]))
            aside += sum(map(bool, receipts["reason"]))
            follow(Progress(samples, manifest.samples, failures, aside))
    return True


def _actors(settings: CensusSettings, nouns: NounSource, units: list[int]) -> ray.data.Dataset:
    """Return the receipts to come: the units of work, one a block, mapped over a pool of actors."""
    pool = actor_pool(settings.workers, settings.gpus_per_worker, machines(), len(units))
    return ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        CensusWorker,
        fn_constructor_args=(settings, nouns, pool.threads, str(Path.cwd())),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cores,
        num_gpus=pool.gpus or None,
    )


def _merge(settings: CensusSettings, folder: RunFolder, info: dict[str, Any]) -> None:
    """Merge what is committed into the tables."""
    receipts = folder.receipts()
    facts = info["model"]
    merge = RunMerge(facts["widths"], from_bytes(folder.store.read(DECODED)), settings.top_k, facts["module_widths"])
    appended: dict[str, list[Any]] = {}
    for receipt in receipts.values():
        for name, rows in merge.add(partial(folder.read_part, receipt)).items():
            appended.setdefault(name, []).append(rows)
    for name in APPENDED:
        write_table(folder.store, name, appended.get(name, []))
    for name, table in merge.tables():
        write_table(folder.store, name, [table])
    folder.finish(
        {
            "samples": sum(receipt.samples for receipt in receipts.values()),
            "failures": sum(receipt.failures for receipt in receipts.values()),
            "shards_aside": {number: receipt.reason for number, receipt in folder.aside(receipts).items()},
            "occurrences": sum(receipt.occurrences for receipt in receipts.values()),
            "concepts": len(merge.concepts.concepts),
            "compute_seconds": round(sum(receipt.seconds for receipt in receipts.values()), 3),
        }
    )
