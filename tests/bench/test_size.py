"""The benchmark of size does what it says for a GPU's shape, too: here a small one, on the CPU."""

import re
import sys

import pytest

from tests.bench import size
from tests.bench.attribution import Shape
from tests.bench.size import PHASES, SHAPES, built


def test_the_real_shape_has_the_neurons_of_llava_7b_and_reads_the_scenes() -> None:
    model = built(SHAPES["llava-1.5-7b"], "meta")
    assert model.widths == (11008,) * 32
    assert 6.9e9 < sum(weight.numel() for weight in model.network.parameters()) < 7.2e9
    # One token per patch of 14 pixels.
    assert model.processor.image_processor.crop_size["height"] == 336
    assert model.processor.patch_size == 14


def test_every_row_of_the_table_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = SHAPES["wide"]
    assert (wide.text["num_hidden_layers"], wide.text["intermediate_size"]) == (32, 11008)
    monkeypatch.setitem(
        SHAPES, "wide", Shape(wide.vision, wide.text | {"num_hidden_layers": 2, "intermediate_size": 64})
    )
    monkeypatch.setattr(
        sys, "argv", ["size", "--samples", "8", "--concepts", "5", "--batch-size", "4", "--rounds", "2", "--end", "9"]
    )
    size.main()
    said = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+) (?:s|GB|kB|%) \|", said, re.MULTILINE))
    assert {f"`{phase}`, as a fraction of the census" for phase in PHASES} < rows.keys()
    assert {
        "plain forward of prepared batches",
        "shard of 9 concepts: reduce them to candidates",
        "bytes of `concepts` per sample",
    } < rows.keys()
    assert "wide, 8 samples, 5 concepts" in said
