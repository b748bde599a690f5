"""Units of work: an actor that does them one by one and commits each once, and the pool of actors that shares them."""

from __future__ import annotations

import errno
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch

from mmray.engine.session import Pool
from mmray.errors import InputError, OutageError, StorageError
from mmray.runs import ATTEMPTS, Receipt, RunFolder
from mmray.storage import FULL, patiently

DISK = (*FULL, errno.EROFS)
"""What a disk says that takes no more: not a unit's fault, and worth an end of the run."""

logger = logging.getLogger(__name__)


class UnitWorker(ABC):
    """Answers each unit of work with the receipt of what it committed.

    Bad input that only a worker can find, such as weights that don't load, is an answer too: `problem`. An exception
    would reach the driver as text, within Ray's report.
    """

    folder: RunFolder

    def __init__(self, threads: int, home: str) -> None:
        # A cluster's workers start elsewhere: relative paths are the driver's.
        if Path(home).is_dir():
            os.chdir(home)
        torch.set_num_threads(threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.problem = ""

    @abstractmethod
    def unit(self, unit: int) -> Receipt:
        """Do one unit of work."""

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        """Do the units in the batch, and return their receipts' numbers by column."""
        receipts = []
        for unit in batch["unit"]:
            try:
                # Nothing is done once there was a problem, which ends the run.
                receipts.append(Receipt(int(unit)) if self.problem else self.unit(int(unit)))
            except InputError as error:
                self.problem = str(error)
                receipts.append(Receipt(int(unit)))
            except OSError as error:
                if error.errno not in DISK:
                    raise
                self.problem = f"{self.folder.store.uri}: {error.strerror}; make room and run again, it goes on"
                receipts.append(Receipt(int(unit)))
        return {
            "shard_id": [receipt.shard_id for receipt in receipts],
            "samples": [receipt.samples for receipt in receipts],
            "failures": [receipt.failures for receipt in receipts],
            "reason": [receipt.reason or "" for receipt in receipts],
            "problem": [self.problem for _ in receipts],
        }

    def attempted(self, unit: int, samples: int, work: Callable[[], Receipt]) -> Receipt:
        """Do a unit's work unless it is committed; the third death of a worker or the third error sets it aside.

        An outage of storage or a full disk is waited out and then ends the run: nothing is quarantined for it.
        """
        committed = self.folder.receipt(unit)
        if committed is not None:
            return committed
        while (number := self.folder.attempt(unit)) <= ATTEMPTS:
            try:
                return patiently(work)
            except Exception as error:
                if _is_no_fault_of_the_unit(error):
                    raise
                logger.exception("unit %d, attempt %d", unit, number)
                self.folder.record_death(unit, number, f"{type(error).__name__}: {error}")
        return self.folder.set_aside(unit, samples)


def mapped(
    worker: type[UnitWorker], arguments: Sequence[Any], units: Sequence[int], pool: Pool, ahead: int = 1
) -> ray.data.Dataset:
    """Return the receipts to come: the units of work, each by itself, mapped over a pool of actors.

    `ahead`: units that an actor is given before it has done its last one. With few and unlike units one actor would
    have several of the large ones, and another none.
    """
    return ray.data.from_arrow([pa.table({"unit": [unit]}) for unit in units]).map_batches(
        worker,
        fn_constructor_args=(*arguments, pool.threads, str(Path.cwd())),
        batch_size=1,
        # What waits is a number, and what comes back a receipt: neither fills the object store.
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.workers, max_size=pool.most, max_tasks_in_flight_per_actor=1 + ahead
        ),
        num_cpus=pool.cores,
        num_gpus=pool.gpus or None,
    )


def _is_no_fault_of_the_unit(error: Exception) -> bool:
    if isinstance(error, InputError):
        return isinstance(error, OutageError) or not isinstance(error, StorageError)
    return isinstance(error, OSError) and error.errno in DISK
