"""The samples that units of later analyses need, read per shard and cached for the next unit."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mmray.data.samples import WINDOW_MARK, Sample
from mmray.data.shards import Manifest, Shard, read_shard
from mmray.data.source import Source
from mmray.features.census.inputs import open_data
from mmray.features.census.settings import CensusSettings
from mmray.neurons.concepts import NounSource

SHARDS_KEPT = 64
"""Shards whose requested samples are cached, with their images still encoded."""


def scored_samples(source: Source, shard: Shard, captions: Mapping[str, str]) -> Iterator[Sample]:
    """Yield the samples of a shard that are in `captions`, with those captions; of a long text its windows there."""
    windows: defaultdict[str, list[int]] = defaultdict(list)
    for name in captions:
        text, _, number = name.rpartition(WINDOW_MARK)
        if number.isdecimal():
            windows[text].append(int(number))
    for sample in read_shard(source, shard):
        if isinstance(sample, Sample) and sample.sample_id in captions:
            # The run may have scored a generated caption, which replaces that of the data.
            yield replace(sample, caption=captions[sample.sample_id])
        elif isinstance(sample, Sample) and sample.image is None:
            for window in sorted(windows[sample.sample_id]):
                yield sample.window(window, captions[f"{sample.sample_id}{WINDOW_MARK}{window}"])


@dataclass
class SampleCache:
    """Samples of a run by id: `shards` maps each to its shard, `captions` to the caption that the run scored."""

    source: Source
    manifest: Manifest
    shards: Mapping[str, int]
    captions: Mapping[str, str]
    cached: OrderedDict[int, dict[str, Sample]] = field(default_factory=OrderedDict)

    def samples(self, ids: Collection[str]) -> dict[str, Sample]:
        """Return these samples, with the captions that the run scored."""
        found: dict[str, Sample] = {}
        for shard in sorted({self.shards[sample_id] for sample_id in ids}):
            found |= {sample_id: sample for sample_id, sample in self._shard(shard).items() if sample_id in ids}
        return found

    def _shard(self, number: int) -> dict[str, Sample]:
        if number not in self.cached:
            samples = scored_samples(self.source, self.manifest.shards[number], self.captions)
            self.cached[number] = {sample.sample_id: sample for sample in samples}
            # The one that was used longest ago comes first.
            if len(self.cached) > SHARDS_KEPT:
                self.cached.popitem(last=False)
        self.cached.move_to_end(number)
        return self.cached[number]


@dataclass(frozen=True)
class RunSamples:
    """What workers on samples of a run need in addition to model and data."""

    census: CensusSettings
    manifest: Manifest
    nouns: NounSource
    shards: Mapping[str, int]
    """Shard of each requested sample."""
    captions: Mapping[str, str]
    """Caption of each, as the run scored it."""
    images: Mapping[str, str]
    """Key of each one's image."""

    def open_cache(self) -> SampleCache:
        """Open the data, and return a cache that reads these samples."""
        return SampleCache(open_data(self.census), self.manifest, self.shards, self.captions)
