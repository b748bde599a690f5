"""The pool of actors that shares units of work."""

import pytest

from mmray.cluster import units
from mmray.engine.session import Pool


def test_a_pool_may_grow_as_far_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    class Blocks:
        def map_batches(self, worker: type, **options: object) -> None:
            given.update(options, worker=worker)

    monkeypatch.setattr(units.ray.data, "from_arrow", lambda tables: Blocks())
    units.mapped(units.UnitWorker, ("settings",), [3, 4, 5], Pool(workers=1, most=2, threads=4, cores=2.0, gpus=0.0))
    strategy = given["compute"]
    assert (strategy.min_size, strategy.max_size) == (1, 2)  # type: ignore[attr-defined]
    assert given["batch_size"] == 1
    assert given["num_cpus"] == 2.0
    assert given["num_gpus"] is None
    assert given["fn_constructor_args"][:2] == ("settings", 4)  # type: ignore[index]
