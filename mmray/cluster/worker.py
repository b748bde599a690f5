"""The actor of a census: one model replica that turns shards into committed parts; a thin shell."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmray.datasets.columns import Columns
from mmray.datasets.contents import Source
from mmray.datasets.shards import Manifest, Shard, read_shard
from mmray.datasets.sources import open_source
from mmray.errors import InputError, OutageError, StorageError
from mmray.neurons.concepts import NounSource
from mmray.neurons.decoding import decode_neurons
from mmray.neurons.model import load_model
from mmray.neurons.run_tables import DECODED
from mmray.neurons.shard import ShardAnalysis
from mmray.runs import ATTEMPTS, Receipt, RunFolder
from mmray.settings import CensusSettings
from mmray.storage import patiently
from mmray.tables import to_bytes

DECODE = -1
"""Number of the unit of work that is not a shard: decoding all neurons."""
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What a disk says that takes no more: not a shard's fault, and worth an end of the run."""

logger = logging.getLogger(__name__)


def columns_of(settings: CensusSettings) -> Columns:
    """Return the columns that the settings name."""
    return Columns(
        image=settings.image_column,
        caption=settings.caption_column,
        sample_id=settings.id_column,
        language=settings.language_column,
        domain=settings.domain_column,
        objects=settings.objects_column,
    )


def open_data(settings: CensusSettings) -> Source:
    """Return the source of the settings' data."""
    return open_source(settings.data, columns_of(settings), captions=settings.captions == "dataset")


class CensusWorker:
    """Loads the model once, then answers each unit of work with the receipt of what it committed.

    Bad input that only a worker can find, such as weights that don't load, is an answer too: `problem`. An exception
    would reach the driver as text, within Ray's report.
    """

    def __init__(self, settings: CensusSettings, nouns: NounSource, threads: int, home: str) -> None:
        # A cluster's workers start elsewhere: relative paths are the driver's.
        if Path(home).is_dir():
            os.chdir(home)
        torch.set_num_threads(threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.settings = settings
        self.nouns = nouns
        self.problem = ""
        try:
            self.model = load_model(settings.model, settings.dtype, trust_remote_code=settings.trust_remote_code)
            self.folder = RunFolder.at(settings.out, patient=True)
            self.manifest = Manifest.from_json(self.folder.manifest())
            self.source = patiently(lambda: open_data(settings))
        except InputError as error:
            self.problem = str(error)
        except FileNotFoundError:
            self.problem = (
                f"{settings.out}: no run there for the worker on {socket.gethostname()}; give an OUT that every "
                "machine of the cluster sees, such as s3://BUCKET/PREFIX"
            )

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        """Do the units in the batch, and return their receipts' numbers by column."""
        receipts = []
        for unit in batch["unit"]:
            try:
                receipts.append(self.unit(int(unit)))
            except InputError as error:
                self.problem = str(error)
                receipts.append(Receipt(int(unit)))
            except OSError as error:
                if error.errno not in DISK:
                    raise
                self.problem = f"{self.settings.out}: {error.strerror}; make room and run again, it goes on"
                receipts.append(Receipt(int(unit)))
        return {
            "shard_id": [receipt.shard_id for receipt in receipts],
            "samples": [receipt.samples for receipt in receipts],
            "failures": [receipt.failures for receipt in receipts],
            "reason": [receipt.reason or "" for receipt in receipts],
            "problem": [self.problem for _ in receipts],
        }

    def unit(self, unit: int) -> Receipt:
        """Do one unit of work; nothing once there was a problem, which ends the run."""
        if self.problem:
            return Receipt(unit)
        return self.decode() if unit == DECODE else self.shard(unit)

    def decode(self) -> Receipt:
        """Decode every neuron of the model and commit the table, unless it is there."""
        if not self.folder.store.exists(DECODED):
            self.folder.store.commit(DECODED, to_bytes(decode_neurons(self.model, fold_norm=self.settings.fold_norm)))
        return Receipt(DECODE)

    def shard(self, shard_id: int) -> Receipt:
        """Analyse and commit a shard; the third death of a worker or the third error sets it aside.

        An outage of storage is waited out and then ends the run, as a full disk does: nothing is set aside for it.
        """
        committed = self.folder.receipt(shard_id)
        if committed is not None:
            return committed
        shard = self.manifest.shards[shard_id]
        while (number := self.folder.attempt(shard_id)) <= ATTEMPTS:
            try:
                return patiently(lambda: self.analyse(shard))
            except Exception as error:
                if _is_no_fault_of_the_shard(error):
                    raise
                logger.exception("shard %d, attempt %d", shard_id, number)
                self.folder.record_death(shard_id, number, f"{type(error).__name__}: {error}")
        return self.folder.set_aside(shard_id, shard.samples)

    def analyse(self, shard: Shard) -> Receipt:
        """Analyse and commit a shard."""
        began = time.perf_counter()
        analysis = ShardAnalysis(self.model, self.settings, self.nouns, shard.shard_id)
        tables = analysis.run(read_shard(self.source, shard))
        return self.folder.commit_shard(shard.shard_id, tables, shard.samples, time.perf_counter() - began)


def _is_no_fault_of_the_shard(error: Exception) -> bool:
    if isinstance(error, InputError):
        return isinstance(error, OutageError) or not isinstance(error, StorageError)
    return isinstance(error, OSError) and error.errno in DISK
