"""The actor of a census: one model replica that turns shards into committed parts; a thin shell."""

from __future__ import annotations

import socket
import time

from mmray.cluster.units import UnitWorker
from mmray.datasets.columns import Columns
from mmray.datasets.contents import Source
from mmray.datasets.shards import Manifest, Shard, read_shard
from mmray.datasets.sources import open_source
from mmray.errors import InputError
from mmray.neurons.concepts import NounSource
from mmray.neurons.decoding import decode_neurons
from mmray.neurons.model import load_model
from mmray.neurons.run_tables import DECODED
from mmray.neurons.shard import ShardAnalysis
from mmray.runs import Receipt, RunFolder
from mmray.settings import CensusSettings
from mmray.storage import patiently

DECODE = -1
"""Number of the unit of work that is not a shard: decoding all neurons."""


def columns_of(settings: CensusSettings) -> Columns:
    """Return the columns that the settings name."""
    return Columns(
        image=settings.image_column,
        caption=settings.caption_column,
        sample_id=settings.id_column,
        language=settings.language_column,
        caption_language=settings.language,
        domain=settings.domain_column,
        objects=settings.objects_column,
        boxes=settings.boxes_column,
        questions=settings.questions_column,
        labels=tuple(settings.label_column or ()),
        background=settings.background,
    )


def open_data(settings: CensusSettings) -> Source:
    """Return the source of the settings' data."""
    return open_source(settings.data, columns_of(settings), captions=settings.captions == "dataset")


class CensusWorker(UnitWorker):
    """Loads the model once, then answers each unit of work with the receipt of what it committed."""

    def __init__(self, settings: CensusSettings, nouns: NounSource, threads: int, home: str) -> None:
        super().__init__(threads, home)
        self.settings = settings
        self.nouns = nouns
        try:
            self.model = load_model(settings.model, settings.dtype, trust_remote_code=settings.trust_remote_code)
            self.folder = RunFolder.at(settings.out, patient=True)
            self.fingerprint = self._begun()
            self.manifest = Manifest.from_json(self.folder.manifest())
            self.source = patiently(lambda: open_data(settings))
        except InputError as error:
            self.problem = str(error)
        except FileNotFoundError:
            self.problem = (
                f"{settings.out}: no run there for the worker on {socket.gethostname()}; give an OUT that every "
                "machine of the cluster sees, such as s3://BUCKET/PREFIX"
            )

    def _begun(self) -> str:
        """Return the fingerprint of the run that is there."""
        info = self.folder.info()
        if info is None:
            raise FileNotFoundError("run.json")
        return str(info["fingerprint"])

    def unit(self, unit: int) -> Receipt:
        """Do one unit of work."""
        return self.decode() if unit == DECODE else self.shard(unit)

    def decode(self) -> Receipt:
        """Decode every neuron of the model and commit the table, unless it is there."""
        if not self.folder.store.exists(DECODED):
            self.folder.commit_table(DECODED, decode_neurons(self.model, fold_norm=self.settings.fold_norm))
        return Receipt(DECODE)

    def shard(self, shard_id: int) -> Receipt:
        """Analyse and commit a shard; the third death of a worker or the third error sets it aside."""
        shard = self.manifest.shards[shard_id]
        return self.attempted(shard_id, shard.samples, lambda: self.analyse(shard))

    def analyse(self, shard: Shard) -> Receipt:
        """Analyse and commit a shard."""
        began = time.perf_counter()
        analysis = ShardAnalysis(self.model, self.settings, self.nouns, shard.shard_id)
        tables = analysis.run(read_shard(self.source, shard))
        seconds = time.perf_counter() - began
        if self._begun() != self.fingerprint:
            # Its driver is dead, and another run has taken the place of one that had no results yet.
            raise InputError(f"{self.folder.store.uri}: another run has been begun here; leave it to that one")
        return self.folder.commit_shard(shard.shard_id, tables, shard.samples, seconds, analysis.skipped)
