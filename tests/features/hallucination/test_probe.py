"""The probe finds planted neurons, beats what is blind to them, and is measured on images that it has not seen."""

import numpy as np
import pytest

from mmray.features.hallucination import probe as probes
from mmray.features.hallucination.probe import BASELINE, BOTH, NEURONS, RANDOM, SHUFFLED, Mentions, fit_probe, judge_all
from mmray.features.hallucination.probe import rank_auroc as auroc

IMAGES, PER_IMAGE, CANDIDATES = 150, 2, 40
PLANTED = (4, 17)


@pytest.fixture(scope="module")
def planted():
    """Mentions whose class two candidates tell, one up and one down; the log-probability tells it less well."""
    draw = np.random.default_rng(0)
    count = IMAGES * PER_IMAGE
    truth = draw.random(count) < 0.3
    shares, controls = draw.random((2, count, CANDIDATES)).astype(np.float32)
    for column, way in zip(PLANTED, (1, -1), strict=True):
        shares[:, column] += way * truth * 0.8
    rows = [
        {"image": f"i{number // PER_IMAGE}", "hallucinated": bool(truth[number]), "confidence": None}
        | {"fold": "fit" if number // PER_IMAGE % 3 else "test"}
        | {"log_prob": -float(draw.random() + 0.4 * truth[number]), "length": 9, "position": number % PER_IMAGE}
        for number in range(count)
    ]
    return Mentions.of(rows), shares, controls


@pytest.fixture(scope="module")
def judged(planted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "SHUFFLES", 5)
        return judge_all(*planted, most=10, draws=100, seed=0)


def test_planted_neurons_are_found_with_their_signs(judged):
    probe, _, _ = judged
    assert set(PLANTED) <= set(probe.columns) and len(probe.columns) <= 10
    weights = probe.model.weights
    assert weights[PLANTED[0]] > 0 > weights[PLANTED[1]]
    assert set(np.argsort(-np.abs(weights))[:2]) == set(PLANTED)


def test_judges_are_measured_on_test_images_alone(planted, judged):
    mentions, _, _ = planted
    _, scores, rows = judged
    test = ~mentions.fit
    found = {row["judge"]: row for row in rows if row["measure"] == "auroc"}
    assert found[NEURONS]["value"] == pytest.approx(auroc(scores[test], mentions.hallucinated[test]))
    assert {row["n"] for row in rows} == {int(test.sum())}
    assert found[NEURONS]["value"] > 0.9 > found[BASELINE]["value"] > 0.55
    assert found[BOTH]["value"] > 0.9
    for chance in (RANDOM, SHUFFLED, "position", "length"):
        assert abs(found[chance]["value"] - 0.5) < 0.16, chance
    gains = [row for row in rows if row["measure"] == "gain"]
    assert gains[0]["value"] == pytest.approx(found[NEURONS]["value"] - found[BASELINE]["value"])
    assert gains[0]["low"] > 0


def test_neither_test_mentions_nor_their_order_change_the_probe(planted, judged):
    mentions, shares, _ = planted
    probe, _, _ = judged
    fit = mentions.fit
    images = [image for image, own in zip(mentions.images, fit, strict=True) if own]
    again = fit_probe(shares[fit], mentions.hallucinated[fit], images, most=10)
    assert np.array_equal(again.model.weights, probe.model.weights)
    # Cross-validated scores rank worse than those of the probe that saw all, and far better than chance.
    held_out, seen = (
        auroc(one, mentions.hallucinated[fit]) for one in (probe.held_out, probe.model.scores(shares[fit]))
    )
    assert 0.85 < held_out <= seen + 0.02


def test_a_class_that_is_too_small_is_said(planted):
    mentions, _, _ = planted
    assert mentions.missing() is None
    few = Mentions(mentions.images, np.arange(len(mentions.images)) < 4, mentions.fit, mentions.facts)
    assert "hallucinated mentions on fit images" in str(few.missing())


def test_auroc_counts_pairs():
    truth = np.array([True, False, False, True])
    assert auroc(np.array([3.0, 1.0, 3.0, 2.0]), truth) == (1 + 0.5 + 1 + 0) / 4


def test_caught_is_the_share_above_nearly_all_true_mentions():
    """A hundred true mentions and four hallucinated ones: two may be above, so the threshold is the third highest."""
    scores = np.concatenate([np.arange(100.0), [96.5, 97.0, 97.5, 99.5]])
    truth = np.arange(104) >= 100
    totals = probes.histograms(["image"] * 104, scores, truth.astype(float))
    # At or above 97.5 are two true ones (98, 99); the tie at 97 would let in a third.
    assert probes.caught(totals)[0] == 2 / 4
    nothing = probes.histograms(["image"] * 104, -scores, truth.astype(float))
    assert probes.caught(nothing)[0] == 0
