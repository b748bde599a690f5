"""The benchmark of size does what it says for a GPU's shape, too: here a small one, on the CPU."""

import re
import sys

import pytest

from tests.bench import size
from tests.bench.attribution import Shape
from tests.bench.size import PHASES, SHAPES, built, concepts_of, of_default_shard


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
        "the same, with freed memory kept as in a census",
        "shard of 9 concepts: reduce them to candidates",
        "bytes of `concepts` per sample",
    } < rows.keys()
    assert "wide, 8 samples, 5 concepts" in said


def test_a_shard_of_the_default_size_shares_what_it_writes_per_neuron() -> None:
    parts = {"captions": 6_400, "concepts": 90_000, "activity": 4_000_000, "examples": 8_000_000}
    found = of_default_shard(parts, 64, 9, 352_256)
    assert found == {
        "captions": 100,
        "concepts": 10_000 * concepts_of(4_000) / 4_000,
        "activity": 1_000,
        "examples": 2_000,
    }
    # Each caption has new nouns, but ever fewer.
    assert concepts_of(1) == 3
    assert 2_500 < concepts_of(4_000) < 3_500
