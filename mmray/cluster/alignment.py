"""The driver of an alignment: train W on Ray Train, then measure the joint model beside the original.

OUT/run.json, manifest.json, lease/      as of a census (`mmray.runs`); the manifest has the images to learn from
OUT/checkpoints/                         how far the training is (`mmray.cluster.alignment_training`)
OUT/alignment.safetensors, .json         W; its shape, digests of tower and LLaVA, and once they are taken its measures
OUT/validation/FINGERPRINT/              the rows of each unit of the validation, committed once
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import pyarrow as pa

from mmray.cluster.alignment_training import PROBLEM, checkpoints, steps_of, train
from mmray.cluster.alignment_validation import Plan, ValidationWorker, plan_validation
from mmray.cluster.carrying import carry_out, pool_for
from mmray.cluster.finished import Finished
from mmray.cluster.units import mapped
from mmray.datasets.columns import Columns
from mmray.datasets.lanes import cut_for_lanes
from mmray.datasets.shards import Manifest
from mmray.datasets.sources import open_source
from mmray.engine import Progress
from mmray.engine.session import ray_session
from mmray.errors import InputError
from mmray.evaluation.summary import summarise
from mmray.models.loading import digest, from_anywhere, resolve
from mmray.perception.alignment import FACTS
from mmray.perception.alignment_settings import AlignmentSettings
from mmray.runs import RunFolder
from mmray.runs.driver import drive
from mmray.runs.lease import Lease
from mmray.tables import EVALUATION_SCHEMAS
from mmray.version import VERSION

TOLD_EVERY = 2.0
"""Seconds between two looks for checkpoints to tell of."""


@dataclass(frozen=True, kw_only=True)
class Aligned(Finished):
    """What a finished alignment amounts to; `measures` has the original model before and the joint one after."""

    out: str
    measures: dict[str, dict[str, Any]]
    steps: int
    images: int
    lost: int
    loss: float

    @property
    def complete(self) -> bool:
        """Tell whether every image could be read and every sample measured."""
        return not self.lost and super().complete


def run_alignment(settings: AlignmentSettings, follow: Callable[[Progress], None] = lambda _: None) -> Aligned:
    """Train and validate an aligned network to the end, or go on where that was stopped.

    `follow` hears of every checkpoint, and then of every unit of the validation. Raises InputError for anything wrong
    with the set-up.
    """
    began = time.perf_counter()
    models = {"model": from_anywhere(settings.model), "tower": from_anywhere(settings.tower)}
    settings = settings.model_copy(update=models)
    source = open_source(settings.data, Columns(), captions=False)
    manifest = cut_for_lanes(source.files(), settings.batch_size, settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: no sample in it")
    plan = plan_validation(settings)
    info = _info(settings, manifest)
    RunFolder.at(settings.out).begin(info, manifest.to_json())
    folder = RunFolder.at(settings.out, patient=True)
    with drive(folder) as lease, ray_session(settings.address):
        if not folder.store.exists(FACTS):
            with _told(folder, settings, manifest.samples * settings.epochs, follow):
                _train(settings, folder, info)
        facts = json.loads(folder.store.read(FACTS))
        rows = _validate(settings, plan, info["fingerprint"], follow, lease)
        measures = summarise(rows.measurements, plan.measured)
        facts["measures"] = {name: value for name, value in measures.items() if value["n"]}
        facts["validated_on"] = {"data": settings.validate_on, "digest": plan.manifest.digest, "samples": rows.samples}
        lease.guard(folder.store).put(FACTS, json.dumps(facts, indent=1).encode())
    training = facts["training"]
    return Aligned(
        out=settings.out,
        measures=facts["measures"],
        steps=training["step"],
        images=training["seen"],
        lost=training["lost"],
        loss=training["loss"],
        failures=rows.failures,
        quarantined=rows.aside,
        seconds=time.perf_counter() - began,
    )


def _info(settings: AlignmentSettings, manifest: Manifest) -> dict[str, Any]:
    digests = {
        "tower": digest(resolve(settings.tower)),
        "model": digest(resolve(settings.model)),
        "data": manifest.digest,
    }
    return {
        "settings": settings.model_dump(exclude={"address"}),
        "result_settings": settings.result_settings(),
        "digests": digests,
        "fingerprint": settings.fingerprint(digests),
        "versions": {"mmray": VERSION},
    }


@contextmanager
def _told(
    folder: RunFolder, settings: AlignmentSettings, images: int, follow: Callable[[Progress], None]
) -> Iterator[None]:
    """Tell how many of so many images are learnt from by each new checkpoint while the block runs."""
    ended = Event()

    def tell() -> None:
        told = 0
        while not ended.wait(TOLD_EVERY):
            steps = max(map(steps_of, checkpoints(folder.store)), default=0)
            if steps > told:
                told = steps
                follow(Progress(min(steps * settings.batch_size, images), images, 0, 0))

    teller = Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _train(settings: AlignmentSettings, folder: RunFolder, info: dict[str, Any]) -> None:
    """Have Ray Train run the workers, and begin them again where some die."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    pool = pool_for(settings.workers, settings.gpus_per_worker, settings.batch_size)
    folder.store.delete(PROBLEM)
    config = {
        "settings": settings,
        "threads": pool.threads,
        "home": str(Path.cwd()),
        "facts": {"digests": info["digests"], "settings": info["settings"], "versions": info["versions"]},
    }
    # What Ray Train itself writes is a few lines of its own state: checkpoints are ours.
    state = f"{gettempdir()}/mmray-align-{uuid4().hex[:8]}"
    own = RunConfig(
        name="align",
        storage_path=state,
        failure_config=FailureConfig(max_failures=settings.restarts),
    )
    resources = {"CPU": pool.cores} | ({"GPU": pool.gpus} if pool.gpus else {})
    scaling = ScalingConfig(num_workers=pool.workers, use_gpu=bool(pool.gpus), resources_per_worker=resources)
    try:
        TorchTrainer(train, train_loop_config=config, scaling_config=scaling, run_config=own).fit()
    except (RuntimeError, TrainingFailedError) as error:
        reason = " ".join(str(error).split())[-300:]
        raise InputError(f"{settings.out}: training ended ({reason}); run again, it goes on") from error
    finally:
        shutil.rmtree(state, ignore_errors=True)
    if folder.store.exists(PROBLEM):
        raise InputError(folder.store.read(PROBLEM).decode())


@dataclass(frozen=True)
class _Validated:
    measurements: pa.Table
    samples: int
    failures: int
    aside: dict[int, str]


def _validate(
    settings: AlignmentSettings, plan: Plan, fingerprint: str, follow: Callable[[Progress], None], lease: Lease
) -> _Validated:
    """Have the joint model measured beside the original, unit by unit."""
    own = plan.fingerprint(fingerprint)
    folder = RunFolder.at(f"{settings.out.rstrip('/')}/validation/{own}", patient=True)
    info = {
        "fingerprint": own,
        "result_settings": plan.measured.model_dump(),
        "digests": {"alignment": fingerprint},
        "shards": len(plan.manifest.shards),
    }
    folder.begin(info, plan.manifest.to_json())

    def actors(units: list[int]) -> Any:
        pool = pool_for(settings.workers, settings.gpus_per_worker, len(units))
        return mapped(ValidationWorker, (plan, folder.store.uri), units, pool, ahead=0)

    sizes = [shard.samples for shard in plan.manifest.shards]
    carry_out(folder, sizes, actors, follow, lease, address=settings.address, retry_failed=settings.retry_failed)
    receipts = folder.receipts()
    return _Validated(
        folder.read_parts(receipts, "measurements", EVALUATION_SCHEMAS["measurements"]),
        sum(receipt.samples for receipt in receipts.values()),
        sum(receipt.failures for receipt in receipts.values()),
        folder.reasons(receipts),
    )
