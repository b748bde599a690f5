"""The samples that a run's units of work ask for, read shard by shard and kept for the next unit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from mmray.data.samples import Sample
from mmray.data.shards import Manifest, read_shard
from mmray.data.source import Source
from mmray.features.census.inputs import open_data
from mmray.features.census.settings import CensusSettings
from mmray.neurons.concepts import NounSource

SHARDS_KEPT = 64
"""Shards whose wanted samples are kept, encoded as they are."""


@dataclass
class SampleCache:
    """Samples of a run by their names: `shards` has the shard of each, `captions` what the run scored."""

    source: Source
    manifest: Manifest
    shards: Mapping[str, int]
    captions: Mapping[str, str]
    kept: OrderedDict[int, dict[str, Sample]] = field(default_factory=OrderedDict)

    def samples(self, names: Collection[str]) -> dict[str, Sample]:
        """Return these samples, with the captions that the run scored."""
        found: dict[str, Sample] = {}
        for shard in sorted({self.shards[name] for name in names}):
            found |= {name: sample for name, sample in self._shard(shard).items() if name in names}
        return found

    def _shard(self, number: int) -> dict[str, Sample]:
        if number not in self.kept:
            rows = read_shard(self.source, self.manifest.shards[number])
            self.kept[number] = {
                row.sample_id: replace(row, caption=self.captions[row.sample_id])
                for row in rows
                if isinstance(row, Sample) and row.sample_id in self.captions
            }
            while len(self.kept) > SHARDS_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(number)
        return self.kept[number]


@dataclass(frozen=True)
class RunSamples:
    """All that workers on samples of a run need other than model and data."""

    census: CensusSettings
    manifest: Manifest
    nouns: NounSource
    shards: Mapping[str, int]
    """The shard of each sample that is wanted."""
    captions: Mapping[str, str]
    """The caption of each, as the run scored it."""
    images: Mapping[str, str]
    """The key of each one's image."""

    def wanted(self) -> SampleCache:
        """Open the data, and return what reads these samples."""
        return SampleCache(open_data(self.census), self.manifest, self.shards, self.captions)
