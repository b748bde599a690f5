"""A score that is told in log-odds is about what ablation takes from them."""

import pytest
import torch

from mmray.models.loading import load
from tests.bench.calibration import REAL, calibration, pairs
from tests.bench.localisation import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    with torch.no_grad():
        return pairs(load("demo"), read("demo", "demo"), 3, 2)


def test_the_effect_is_about_what_ablation_takes(found):
    effect, first = (calibration(found, score, 0.1) for score in ("effect", "first order"))
    assert 0.8 < effect["median"] < 1.1
    assert effect["correlation"] > 0.9
    assert abs(effect["median"] - 1) < abs(first["median"] - 1)


def test_a_folded_contribution_is_more_than_ablation_takes(found):
    assert calibration(found, "contribution, folded", 0.1)["median"] > 1.3
    assert found.num_rows > 10
    assert {*REAL, *REAL.values(), "layer"} == set(found.column_names)
