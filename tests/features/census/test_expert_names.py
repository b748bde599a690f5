"""A census of a model with experts names each neuron by its expert, and is asked by that name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmray.runs.run import open_run
from tests.support.local_jobs import census_here


@pytest.mark.slow
def test_tables_name_the_expert(tiny: Callable[[str], Path], tmp_path: Path, coco: Any) -> None:
    out = tmp_path / "run"
    assert census_here(str(tiny("qwen3_vl_moe")), str(coco.train), out, limit=4).complete
    run = open_run(out)
    experts, units = run.info["model"]["experts"][0]
    assert experts * units == run.info["model"]["widths"][0]
    concept = next(iter(run.concepts))
    for row in run.rank(concept, 5).to_pylist():
        expert, unit = divmod(row["unit"], units)
        assert row["neuron"] == f"L{row['layer']}.e{expert}.u{unit}"
        assert run.neuron(row["neuron"])["unit"] == run.neuron(f"L{row['layer']}.u{row['unit']}")["unit"] == row["unit"]
