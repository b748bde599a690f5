"""The driver of a census: fix the shards, hand them to actors, follow what is committed, merge, rank."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmray.cluster.finished import Finished
from mmray.cluster.units import mapped
from mmray.cluster.worker import DECODE, CensusWorker, open_data
from mmray.datasets.contents import Source
from mmray.datasets.limits import check_columns
from mmray.datasets.shards import Manifest, cut, read_shard
from mmray.engine import Progress
from mmray.engine.session import actor_pool, machines, ray_session
from mmray.errors import InputError
from mmray.models.loading import describe_model, digest, from_anywhere, resolve
from mmray.neurons.concepts import TAGGERS, NounSource, noun_source
from mmray.neurons.planning import describe, estimate, first_rows
from mmray.neurons.run_tables import DECODED, is_merged, merge_run
from mmray.results.plan import Plan
from mmray.runs import DamagedUnitError, Receipt, RunFolder
from mmray.runs.driver import drive
from mmray.runs.lease import Lease
from mmray.runs.receipts import skipped
from mmray.settings import CensusSettings
from mmray.storage import lies_in, open_store
from mmray.version import VERSION

PEEKED = 16
"""Samples that the driver reads."""


@dataclass(frozen=True, kw_only=True)
class Outcome(Finished):
    """What a finished census amounts to."""

    out: str
    samples: int
    skipped: dict[str, int]
    """Samples that were counted and kept, but have nothing to rank neurons for, by reason; these are no failures."""
    analysed: int
    """Samples that failures and skips are counted of: all, but for a refresh those that it analysed."""
    occurrences: int
    already: bool = False
    """All of it was done by earlier calls."""


def run_census(
    settings: CensusSettings,
    follow: Callable[[Progress], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run a census to its end, or go on with one that stopped, and return what it amounts to.

    `follow` hears of every committed shard, `warn` of captions whose language the tagger of nouns does not know. Raises
    InputError for anything wrong with the set-up, before any work.
    """
    began = time.perf_counter()
    settings = settings.model_copy(update={"model": from_anywhere(settings.model)})
    source, manifest, nouns = open_inputs(settings)
    check_apart(settings.out, source)
    info = run_info(settings, source, manifest, nouns)
    if RunFolder.at(settings.out).info() is None:
        check_columns(source, manifest)
    _begin(RunFolder.at(settings.out), info, manifest)
    folder = RunFolder.at(settings.out, patient=True)
    work = unfinished(settings, folder)
    if work:
        if nouns.kind in TAGGERS and settings.captions == "dataset":
            for line in describe(*first_rows(source, manifest), nouns).warnings:
                warn(line)
        with drive(folder) as lease:
            # Before the lease was held, another call may have put its own run in place of one that had no results.
            folder.check_same(info)
            finish(settings, folder, nouns, follow, lease)
    done = outcome(settings.out, folder, time.perf_counter() - began)
    return replace(done, already=not work)


def check_apart(out: str, source: Source) -> None:
    """Raise InputError where the run's folder would lie in the folder of its data, or the data in the run's folder."""
    place = getattr(source, "place", None)
    if place is None or not place.folder:
        return
    uri = open_store(out).uri
    folder = open_store(place.folder).uri
    whole = place.whole or not place.entries
    if whole and lies_in(uri, folder):
        raise InputError(f"--out {out}: lies in the data's folder {folder}; choose an OUT outside it")
    if (whole and lies_in(folder, uri)) or any(lies_in(f"{folder}/{entry.key}", uri) for entry in place.entries):
        raise InputError(f"--out {out}: the data {source.data} lies in it; choose a folder of the run's own")


def unfinished(settings: CensusSettings, folder: RunFolder) -> bool:
    """Tell whether a run has shards to analyse, or tables that are not those of its shards."""
    try:
        receipts = folder.receipts()
        pending = _pending(settings, folder, _manifest(folder), receipts)
    except DamagedUnitError:
        return True
    return bool(pending) or not is_merged(folder, receipts)


def finish(
    settings: CensusSettings,
    folder: RunFolder,
    nouns: NounSource,
    follow: Callable[[Progress], None],
    lease: Lease,
) -> None:
    """Have all shards of a run analysed and its tables made, as long as this driver holds the lease."""
    manifest = _manifest(folder)
    folder.repair()
    _work(settings, folder, manifest, nouns, follow, lease)
    receipts = folder.receipts()
    missing = _pending(settings.model_copy(update={"retry_failed": False}), folder, manifest, receipts)
    check_complete(folder.store.uri, missing)
    if not is_merged(folder, receipts):
        info = folder.info()
        if info is None:
            raise InputError(f"{folder.store.uri}: run.json is gone; put it back, or begin another run")
        facts, guarded = info["model"], RunFolder(lease.guard(folder.store))
        merge_run(guarded, facts["widths"], settings.top_k, facts.get("module_widths", {}))


def outcome(out: str, folder: RunFolder, seconds: float, since: int = 0) -> Outcome:
    """Return what the run amounts to; what failed or was skipped is told of shards from number `since` on."""
    receipts = folder.receipts()
    told = [receipt for receipt in receipts.values() if receipt.shard_id >= since]
    return Outcome(
        out=out,
        samples=sum(receipt.samples for receipt in receipts.values()),
        failures=sum(receipt.failures for receipt in told),
        skipped=skipped(told),
        analysed=sum(receipt.samples for receipt in told),
        occurrences=sum(receipt.occurrences for receipt in receipts.values()),
        quarantined={shard: reason for shard, reason in folder.reasons(receipts).items() if shard >= since},
        seconds=seconds,
    )


def plan_census(settings: CensusSettings) -> Plan:
    """Return what the census would cost, without running it."""
    source, manifest, nouns = open_inputs(settings)
    check_columns(source, manifest)
    facts = describe_model(settings.model, trust_remote_code=settings.trust_remote_code)
    return estimate(settings, source, manifest, nouns, facts["widths"], facts["parameters"], facts["image_tokens"])


def open_inputs(settings: CensusSettings) -> tuple[Source, Manifest, NounSource]:
    """Return the data, its shards as they would be cut now, and where concepts come from."""
    source = open_data(settings)
    manifest = cut(source.files(), settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: no sample in it")
    # What is left out of samples is said when it is met first: here too, where it is heard.
    deque(islice(read_shard(source, manifest.shards[0]), PEEKED), maxlen=0)
    vocabulary = source.objects_vocabulary() if settings.nouns in ("auto", "objects") else ()
    return source, manifest, noun_source(settings.nouns, vocabulary, source.translations())


def run_info(settings: CensusSettings, source: Source, manifest: Manifest, nouns: NounSource) -> dict[str, Any]:
    """Return what run.json says: settings, fingerprint, versions, model parts, data digest."""
    folder = resolve(settings.model)
    digests = {
        "model": digest(folder),
        "data": manifest.digest,
        "nouns": nouns.digest(generated=settings.captions == "generate"),
    }
    return {
        "settings": settings.model_dump(exclude={"address"}),
        "result_settings": settings.result_settings(),
        "digests": digests,
        "fingerprint": settings.fingerprint(**digests),
        "model": describe_model(settings.model, trust_remote_code=settings.trust_remote_code),
        "data": {"kind": source.kind, "columns": source.columns.model_dump(), "samples": manifest.samples},
        "shards": len(manifest.shards),
        "nouns": nouns.kind,
        "home": str(Path.cwd()),
        "versions": {"mmray": VERSION, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "ray", "pyarrow")},
    }


def check_complete(uri: str, missing: Sequence[int]) -> None:
    """Raise InputError if units are missing that were neither committed nor quarantined after all work was done."""
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
        raise InputError(f"{uri}: no receipt of unit {listed}: removed by others, or lost; run the same command again")


def _manifest(folder: RunFolder) -> Manifest:
    try:
        return Manifest.from_json(folder.manifest())
    except InputError as error:
        raise InputError(
            f"{folder.store.uri}: the manifest is damaged ({error}); begin another run, or put it back"
        ) from error


def _begin(folder: RunFolder, info: dict[str, Any], manifest: Manifest) -> None:
    """Begin the run or join it; one of other settings without any result is replaced: it was refused, or mistyped."""

    def is_in_the_way() -> bool:
        before = folder.info()
        return before is not None and before["fingerprint"] != info["fingerprint"] and not folder.has_results()

    if is_in_the_way():
        with drive(folder):
            # Whoever held the lease until now may have got results.
            if is_in_the_way():
                folder.store.delete(DECODED)
                folder.clear()
            folder.begin(info, manifest.to_json())
        return
    folder.begin(info, manifest.to_json())


def _pending(
    settings: CensusSettings, folder: RunFolder, manifest: Manifest, committed: dict[int, Receipt]
) -> list[int]:
    """Return the shards that are neither committed nor set aside; those set aside too where they are to be retried."""
    over = set(committed) if settings.retry_failed else {*committed, *folder.aside(committed)}
    return [shard.shard_id for shard in manifest.shards if shard.shard_id not in over]


def _work(
    settings: CensusSettings,
    folder: RunFolder,
    manifest: Manifest,
    nouns: NounSource,
    follow: Callable[[Progress], None],
    check: Callable[[], None],
) -> None:
    """Have every pending shard analysed; `check` raises where this driver is not to go on."""
    done = folder.receipts()
    pending = _pending(settings, folder, manifest, done)
    if not settings.retry_failed:
        done |= folder.aside(done)
    units = pending if folder.store.exists(DECODED) else [DECODE, *pending]
    samples, failures = sum(r.samples for r in done.values()), sum(r.failures for r in done.values())
    aside = sum(r.reason is not None for r in done.values())
    follow(Progress(samples, manifest.samples, failures, aside))
    if not units:
        return
    folder.reopen(pending)
    with nullcontext() if settings.local else ray_session(settings.address):
        for receipts in _receipts(settings, nouns, units):
            check()
            if problem := next(filter(None, receipts["problem"]), None):
                raise InputError(problem)
            if max(receipts["shard_id"]) == DECODE:
                continue
            samples += int(sum(receipts["samples"]))
            failures += int(sum(receipts["failures"]))
            aside += sum(map(bool, receipts["reason"]))
            follow(Progress(samples, manifest.samples, failures, aside))


def _receipts(settings: CensusSettings, nouns: NounSource, units: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the receipts of the units of work as they come, those of a few units in columns."""
    if settings.local:
        worker = CensusWorker(settings, nouns, torch.get_num_threads(), str(Path.cwd()))
        yield from (worker({"unit": np.array([unit])}) for unit in units)
        return
    pool = actor_pool(settings.worker_range, settings.gpus_per_worker, machines(), len(units))
    # Nothing is fetched ahead: what is committed is told at once, not when the next shard is done too.
    yield from mapped(CensusWorker, (settings, nouns), units, pool).iter_batches(batch_size=None, prefetch_batches=0)
