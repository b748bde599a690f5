"""The benchmark of attribution does what it says for a GPU's shape too: here a small one, on the CPU."""

import re
import sys

import pytest
import torch

from tests.bench import attribution
from tests.bench.attribution import SHAPES, Shape, shaped


def test_the_shape_is_that_of_llava_7b() -> None:
    model = shaped("meta", SHAPES["llava-1.5-7b"])
    assert model.widths == (11008,) * 32
    assert 6.9e9 < sum(weight.numel() for weight in model.network.parameters()) < 7.2e9
    assert {weight.dtype for weight in model.network.parameters()} == {torch.float16}


def test_every_row_of_the_table_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    known = SHAPES["llava-1.5-7b"]
    text = known.text | small | {"num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", Shape(known.vision | small | {"image_size": 56}, text))
    options = ["--shape", "llava-1.5-7b", "--batch-size", "2", "--rounds", "1", "--published-images", "1"]
    monkeypatch.setattr(sys, "argv", ["attribution", *options])
    attribution.main()
    rows = dict(re.findall(r"^(\S.*?)  +([\d.]+) ", capsys.readouterr().out, re.MULTILINE))
    assert {"plain forward", "census", "generate, then census", "gradient, one noun", "published, per image"} <= set(
        rows
    )
    assert min(map(float, rows.values())) > 0
