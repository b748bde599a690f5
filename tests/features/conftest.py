"""Scenes of the demo that no census saw, and what its model says of them before any edit; shared by all tests."""

from typing import Any

import pytest

from mmray.data.samples import Sample
from mmray.data.shards import cut, read_shard
from mmray.data.sources import open_source
from mmray.demo import EVALUATION
from mmray.features.evaluation.baseline_replies import BaselineReplies
from mmray.objects.statistics import ObjectStatistics, gather_statistics

SCENES = 24


@pytest.fixture(scope="session")
def all_scenes() -> list[Sample]:
    source = open_source(str(EVALUATION))
    (shard,) = cut(source.files(), 1000).shards
    return [row for row in read_shard(source, shard) if isinstance(row, Sample)]


@pytest.fixture(scope="session")
def scenes(all_scenes: list[Sample]) -> list[Sample]:
    return all_scenes[:SCENES]


@pytest.fixture(scope="session")
def facts(all_scenes: list[Sample]) -> ObjectStatistics:
    return gather_statistics((sample.objects for sample in all_scenes), open_source(str(EVALUATION)).translations())


@pytest.fixture(scope="session")
def before(demo: Any) -> BaselineReplies:
    return BaselineReplies(demo, batch_size=8)
