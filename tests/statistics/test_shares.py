"""Intervals of shares cover the truth as often as they say, near 1 and with several outcomes per image."""

from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.features.evaluation.measures import MEASURES, measure_of
from mmray.features.properties.measures import above, placements
from mmray.features.properties.observations import Key, Observations, summarise
from mmray.statistics.bootstrap import measure
from mmray.statistics.shares import NORMAL, share_interval, wilson


def sums(outcomes: np.ndarray, of: float = 1.0) -> np.ndarray:
    outcomes = outcomes.astype(float)
    return np.stack([outcomes, np.full_like(outcomes, of)], axis=1)


def coverage(n: int, truth: float, *, share: bool) -> float:
    """The chance that an interval of n outcomes holds the truth: exactly, over all numbers of successes."""
    covered = 0.0
    for successes in range(n + 1):
        rows = sums(np.arange(n) < successes)
        found = measure(rows, rows, share=share, draws=400)
        assert found.low is not None
        assert found.high is not None
        chance = comb(n, successes) * truth**successes * (1 - truth) ** (n - successes)
        covered += chance * (found.low <= truth <= found.high)
    return covered


def test_a_share_near_one_of_few_images_is_covered() -> None:
    """Of fourteen images at 0.97 most draws are all successes: resampled they give the interval 1 to 1."""
    assert coverage(14, 0.97, share=True) > 0.93
    assert coverage(14, 0.97, share=False) < 0.4
    assert coverage(20, 0.6, share=True) > 0.93


@given(st.integers(1, 60), st.data())
def test_independent_outcomes_have_wilson_s_interval(n: int, data: st.DataObject) -> None:
    """Its ends solve (share − p)² = z² p (1 − p) / n."""
    successes = data.draw(st.integers(0, n))
    share = successes / n
    found = share_interval(sums(np.arange(n) < successes), share)
    assert found is not None
    assert found == pytest.approx(wilson(share, n), abs=1e-9)
    assert found[0] <= share <= found[1]
    assert found[1] - found[0] > 0.01
    for end in found:
        inside = 0 < end < 1
        assert abs(share - end) == pytest.approx(NORMAL * sqrt(end * (1 - end) / n), abs=1e-9) or not inside


def test_outcomes_of_one_image_count_as_they_vary() -> None:
    """Five captions of an image that always agree are one outcome; that have nothing to do with it, five."""
    random = np.random.default_rng(0)
    images = random.random(40) < 0.7
    copied = sums(5 * images, 5)
    assert share_interval(copied, images.mean()) == pytest.approx(wilson(images.mean(), 40))
    apart = random.binomial(5, 0.7, 4000)
    share = apart.sum() / 20000
    low, high = share_interval(sums(apart, 5), share) or (0, 0)
    assert high - low == pytest.approx(np.subtract(*wilson(share, 20000)[::-1]), rel=0.05)
    every = share_interval(sums(np.full(14, 5), 5), 1.0)
    assert every == wilson(1.0, 14)


def test_clusters_are_covered() -> None:
    """400 times 30 images with three outcomes each that go together (a share of 0.8 drawn anew for each image)."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        rows = sums(random.binomial(3, random.beta(2.4, 0.6, 30)), 3)
        found = measure(rows, rows, share=True)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.8 <= found.high
    assert covered >= 366


def test_fractions_are_resampled_but_never_of_no_width_at_the_ends() -> None:
    fractions = sums(np.random.default_rng(2).random(30))
    resampled = measure(fractions, fractions)
    assert measure(fractions, fractions, share=True) == resampled
    ones = sums(np.ones(6))
    found = measure(ones, ones, share=True)
    assert (found.low, found.high) == wilson(1.0, 6)
    # Images without an outcome say nothing.
    lacking = np.concatenate([ones, np.zeros((10, 2))])
    assert measure(lacking, lacking, share=True).low == found.low


def test_numbers_of_any_size_are_no_shares() -> None:
    assert {name for name, kind in MEASURES.items() if kind.unit != "share"} >= {
        "bleu",
        "mean_length",
        "text_locality_kl",
    }
    assert all(
        measure_of(name).unit == "share" for name in ("reliability", "reliability:a→b", "chair_i", "pope_random_f1")
    )


def auroc(own: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """The AUROC of a concept's images against others as the table of properties has it, with its interval."""
    import torch

    found, key = Observations(), Key("specificity", "auroc", "score", 10)
    told, apart = placements(torch.tensor(own), torch.tensor(others))
    found.extend(key, "dog", [f"own {n}" for n in range(len(own))], told.tolist())
    for n, value in enumerate(apart.tolist()):
        found.add(key, "dog", f"other {n}", value, of=0.0)
    row = summarise(found.tables()["observations"], 300, 0).to_pylist()[0]
    assert row["n"] == len(own) + len(others)
    return row["value"], row["low"], row["high"]


def test_intervals_of_an_auroc_resample_both_sides() -> None:
    """Normal scores 1.5 deviations apart: resampling own images alone covers the truth far less often."""
    import torch

    truth = float(torch.special.ndtr(torch.tensor(1.5 / sqrt(2))))
    random = np.random.default_rng(3)
    both = single = 0
    for number in range(200):
        own, others = random.normal(1.5, size=24), random.normal(size=8)
        value, low, high = auroc(own, others)
        plain = above(torch.tensor(own), torch.tensor(others)).numpy()
        assert value == pytest.approx(plain.mean())
        both += low <= truth <= high
        rows = sums(plain)
        alone = measure(rows, rows, draws=300, seed=number)
        assert alone.low is not None
        assert alone.high is not None
        single += alone.low <= truth <= alone.high
    assert both >= 165
    assert single <= both - 40
