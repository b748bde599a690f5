"""An actor holds two batches of pixels at most, however long its shard is."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mmray.features.census import shard
from tests.support.local_jobs import census_here
from tests.support.scenes import scenes, write


@pytest.mark.parametrize("batch_size", [1, 3])
def test_two_batches_of_pixels_at_most(tiny: Callable[[str], Path], tmp_path: Path, batch_size: int) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    encode = shard.encode

    def counted(*given: Any) -> Any:
        batch = encode(*given)
        made.append(weakref.ref(batch))
        alive.append(sum(reference() is not None for reference in made))
        return batch

    data = write(tmp_path / "data.parquet", scenes(12))
    gc.disable()  # they are to go by themselves, not when the collector comes
    try:
        with patch.object(shard, "encode", counted):
            census_here(tiny("llava"), str(data), tmp_path / "run", batch_size=batch_size)
    finally:
        gc.enable()
    assert len(alive) == 12 // batch_size
    assert max(alive) <= 2
