"""A plan's bytes are those of the run: concepts extrapolated, sizes by arithmetic or from a shard."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.census.bytes_written import by_arithmetic, expected_concepts, expected_repeated, of_shard
from mmray.features.census.planning import plan_census
from mmray.features.census.settings import census_settings
from mmray.runs.tables import part_to_bytes
from tests.support.samples import analyse, samples

seen = st.lists(st.integers(1, 9), min_size=1, max_size=60).map(
    lambda counts: Counter(dict(enumerate(map(int, counts))))
)


@given(seen, st.floats(0, 20))
def test_concepts_grow_with_occurrences_through_what_was_seen(counts: Counter[Any], times: float) -> None:
    total = counts.total()
    found = expected_concepts(counts, times * total)
    assert expected_concepts(counts, total) == pytest.approx(len(counts))
    assert (found <= len(counts) + 1e-9) if times <= 1 else (found >= len(counts) - 1e-9)
    # Of each occurrence at most one new concept comes, and repeated ones are some of all.
    assert 0 <= expected_concepts(counts, times * total + 1) - found <= 1 + 1e-9
    assert 0 <= expected_repeated(counts, times * total) <= found + 1e-9
    if times >= 1:
        once = sum(count == 1 for count in counts.values())
        assert expected_repeated(counts, total) == pytest.approx(len(counts) - once, abs=1)


def test_a_sample_foretells_the_concepts_of_less_and_of_more() -> None:
    random = np.random.default_rng(0)
    chances = 1 / (np.arange(400) + 20.0)
    drawn = random.choice(400, 2_000, p=chances / chances.sum())
    first = Counter(map(str, drawn[:500]))
    for occurrences in (100, 250, 1_000, 2_000):
        counts = Counter(drawn[:occurrences].tolist())
        repeated = sum(count > 1 for count in counts.values())
        assert expected_concepts(first, occurrences) == pytest.approx(len(counts), rel=0.1)
        assert expected_repeated(first, occurrences) == pytest.approx(repeated, rel=0.2)


@pytest.mark.slow
def test_a_plan_foretells_the_bytes_of_a_run_of_the_demo(coco: Any, coco_run: Path, tmp_path: Path) -> None:
    asked = {"model": "demo", "data": str(coco.train), "out": str(tmp_path / "run"), "shard_size": 60}
    plan = plan_census(census_settings(asked))
    folders = [coco_run / name for name in ("shards", "decoding", "snapshots/census", "snapshots/census")]
    # The second time for the copies in `tables`, where other analyses have theirs, too.
    written = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    assert plan.bytes_written == pytest.approx(written, rel=0.2)


def test_bytes_by_part_add_up_to_those_of_a_shard(open_model: Any) -> None:
    given = samples()
    tables = analyse(open_model("llava"), given)
    parts, concepts = of_shard(tables, len(given)), tables["concepts"]
    repeated = len(concepts) - concepts["score_squares"].null_count
    of_concepts = len(concepts) * parts.per_concept + repeated * parts.per_repeated
    found = parts.per_shard + of_concepts + len(given) * parts.per_sample
    assert found == pytest.approx(sum(len(part_to_bytes(table)) for table in tables.values()))


def test_more_labels_and_more_neurons_take_more_bytes() -> None:
    small, large = by_arithmetic(8_192, 8_192, 2, 20.0), by_arithmetic(352_256, 2_048, 2, 20.0)
    assert large.per_shard == pytest.approx(small.per_shard * 352_256 / 8_192)
    # Only a few of many neurons are kept, with their places.
    assert small.per_concept / 8_192 < large.per_concept / 2_048
    assert replace(small, per_shard=0.0) == replace(by_arithmetic(8_192, 8_192, 18, 20.0), per_shard=0.0)
    assert by_arithmetic(8_192, 8_192, 18, 20.0).per_shard > 2 * small.per_shard
