"""The driver of an alignment: train the aligned network W on Ray Train, then compare the joint model with the original.

OUT/run.json, manifest.json, lease/      as for a census (`mmray.runs`); the manifest has the images to train on
OUT/checkpoints/                         progress of the training (`mmray.features.alignment.training`)
OUT/alignment.safetensors, .json         W; its shape, digests of tower and LLaVA, and later its measures
OUT/validation/FINGERPRINT/              the rows of each unit of the validation, committed once
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from mmray.data.columns import Columns
from mmray.data.shards import Manifest
from mmray.data.sources import open_source
from mmray.data.training_order import cut_for_training
from mmray.detector.alignment import FACTS
from mmray.engine import Progress, executor_for
from mmray.engine import run as run_job
from mmray.engine.driver import Follow
from mmray.engine.session import actor_pool, machines
from mmray.errors import InputError
from mmray.features.alignment.settings import AlignmentSettings
from mmray.features.alignment.training import PROBLEM, checkpoints, steps_of, train
from mmray.features.alignment.validation import ValidationJob, plan_validation
from mmray.models.loading import digest, from_anywhere, require_images, resolve
from mmray.runs import RunFolder
from mmray.runs.driver import drive
from mmray.version import VERSION

POLL_SECONDS = 2.0
"""Seconds between two listings of the checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """A finished alignment."""

    out: str
    measures: dict[str, dict[str, Any]]
    """Measures of the original model (before) and of the joint model (after)."""
    steps: int
    images: int
    lost: int
    """Images that could not be read."""
    loss: float
    failures: int
    """Samples of the validation that failed."""
    quarantined: dict[int, str]
    """Unit of the validation → why it was quarantined."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every image could be read and every sample measured."""
        return not self.lost and not self.failures and not self.quarantined


def run_alignment(settings: AlignmentSettings, follow: Follow = lambda _: None) -> Aligned:
    """Train and validate an aligned network, or resume where that stopped.

    Calls `follow` after every checkpoint, then after every unit of the validation. Raises InputError for anything wrong
    with the set-up.
    """
    began = time.perf_counter()
    models = {"model": from_anywhere(settings.model), "tower": from_anywhere(settings.tower)}
    settings = settings.model_copy(update=models)
    require_images(settings.model, "mmray align")
    source = open_source(settings.data, Columns(), captions=False)
    manifest = cut_for_training(source.files(), settings.batch_size, settings.shard_size, settings.limit)
    if not manifest.samples:
        raise InputError(f"{settings.data}: has no samples; check --data and --limit")
    # Planned before the training, so that wrong validation data is reported at once, not after hours.
    validation = plan_validation(settings)
    if settings.local and not RunFolder.at(settings.out).store.exists(FACTS):
        raise InputError(f"--local: {settings.out} is not trained yet, and the training needs Ray; leave --local out")
    info = _info(settings, manifest)
    RunFolder.at(settings.out).begin(info, manifest.to_json())
    folder, executor = RunFolder.at(settings.out), executor_for(settings)
    with drive(folder) as lease, executor.session():
        if not folder.store.exists(FACTS):
            with _reporting(folder, settings, manifest.samples * settings.epochs, follow):
                _train(settings, folder, info)
        job = ValidationJob(settings, info["fingerprint"], validation)
        done = run_job(job, executor=executor, follow=follow, lease=lease)
    training = done.headline["training"]
    return Aligned(
        out=settings.out,
        measures=done.headline["measures"],
        steps=training["step"],
        images=training["seen"],
        lost=training["lost"],
        loss=training["loss"],
        failures=done.failures,
        quarantined=dict(done.quarantined),
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
def _reporting(folder: RunFolder, settings: AlignmentSettings, images: int, follow: Follow) -> Iterator[None]:
    """Report the number of images trained on, out of `images`, at each new checkpoint during the with-block."""
    ended = Event()

    def report() -> None:
        reported = 0
        while not ended.wait(POLL_SECONDS):
            # The workers are other processes, and checkpoints are the only progress that they share.
            steps = max(map(steps_of, checkpoints(folder.store)), default=0)
            if steps > reported:
                reported = steps
                # The last step of an epoch may have fewer images than a batch.
                follow(Progress(min(steps * settings.batch_size, images), images, 0, 0))

    reporter = Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def _train(settings: AlignmentSettings, folder: RunFolder, info: dict[str, Any]) -> None:
    """Let Ray Train run the workers, and restart them if some die."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    pool = actor_pool(settings.worker_range, settings.gpus_per_worker, machines(), settings.batch_size)
    # A problem of an earlier call may be fixed by now.
    folder.store.delete(PROBLEM)
    config = {
        "settings": settings,
        "threads": pool.threads,
        "home": str(Path.cwd()),
        "facts": {"digests": info["digests"], "settings": info["settings"], "versions": info["versions"]},
    }
    # Ray Train only writes a few lines of its own state here; the checkpoints are in the run's folder.
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
        raise InputError(f"{settings.out}: training ended ({reason}); run again to resume") from error
    finally:
        shutil.rmtree(state, ignore_errors=True)
    # Workers end without an error after a wrong set-up, or Ray Train would restart them.
    if folder.store.exists(PROBLEM):
        raise InputError(folder.store.read(PROBLEM).decode())
