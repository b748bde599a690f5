"""The controls of a choice: a planted neuron is beyond chance and stable, and noise is neither."""

import numpy as np
import pytest
import torch

from mmray.features.selectivity import contrast, lape
from mmray.features.selectivity.replicates import draw
from mmray.features.selectivity.rows import label_rows
from mmray.features.selectivity.selection import QUANTITY, Totals, select
from mmray.features.selectivity.settings import selectivity_settings

SAMPLES, NEURONS, TOKENS, PERMUTATIONS, BOOTSTRAPS = 120, 400, 20, 19, 10
PLANTED = {"x": 7, "y": 200}


def chosen(method, planted, rate=0.01):
    """Return the selection from samples of two labels, its totals, and the settings."""
    generator = np.random.default_rng(4)
    labelled = {f"s{number:03d}": "xy"[number % 2] for number in range(SAMPLES)}
    seen = generator.binomial(TOKENS, 0.3, (SAMPLES, NEURONS)).astype(np.float32)
    for label, neuron in planted.items():
        own = np.array([of == label for of in labelled.values()])
        seen[:, neuron] = np.where(own, TOKENS, 0)
    replicates = draw(labelled, PERMUTATIONS, BOOTSTRAPS, 0)
    matrix = replicates.matrix(list(labelled)).double()
    shape = (len(replicates), 2, NEURONS)
    sums = (matrix @ torch.from_numpy(seen).double()).reshape(shape).transpose(1, 2)
    totals = Totals(sums, TOKENS * matrix.sum(dim=1).reshape(shape[:2]))
    settings = selectivity_settings({"run": "none", "method": method, "rate": rate})
    return select({QUANTITY[method]: totals, "squares": totals}, settings, PERMUTATIONS), totals, settings


def scores(totals, replicate, settings):
    amount = lape.probabilities(totals.sums[replicate], totals.tokens[replicate])
    if settings.method == "contribution":
        return contrast.contrasts(amount).amax(dim=1).neg()
    return lape.filtered_entropies(amount, lape.bar_of(amount, settings.bar))


@pytest.mark.parametrize("method", QUANTITY)
def test_planted_neurons_are_beyond_chance_and_stable(method):
    found, _, _ = chosen(method, PLANTED, rate=0.005 if method == "lape" else 0.0025)
    for place, neuron in enumerate(PLANTED.values()):
        assert found.chosen.of(place).tolist() == [neuron]
        assert found.p_value[neuron] == 1 / (1 + PERMUTATIONS)
        assert found.stability[neuron, place] == 1
        assert found.stability[neuron, 1 - place] == 0
        assert found.chance[place] == 0
        assert found.overlap[place] == 1
        assert found.amount[neuron].tolist() == [1.0 - place, float(place)]
        assert found.cut[place] == (0 if method == "lape" else 1)


@pytest.mark.parametrize("method", QUANTITY)
def test_noise_is_not(method):
    """Of neurons that no label moves one in twenty is as good as the best of nineteen shuffles, and few last."""
    found, _, _ = chosen(method, {})
    own = torch.cat([found.chosen.of(place) for place in range(2)])
    assert (found.p_value <= 1 / (1 + PERMUTATIONS)).double().mean() < 0.1
    counts = torch.tensor([len(found.chosen.of(place)) for place in range(2)]).double()
    assert found.chance.sum() > 0.3 * counts.sum()
    assert found.stability[own].amax(dim=1).mean() < 0.7
    assert found.overlap.mean() < 0.5


@pytest.mark.parametrize("method", QUANTITY)
@pytest.mark.parametrize("planted", [PLANTED, {}])
def test_controls_are_those_of_a_loop(method, planted):
    found, totals, settings = chosen(method, planted)
    before = scores(totals, 0, settings)
    for neuron in range(0, NEURONS, 37):
        as_good = sum(bool(scores(totals, 1 + n, settings)[neuron] <= before[neuron]) for n in range(PERMUTATIONS))
        assert found.p_value[neuron] == (1 + as_good) / (1 + PERMUTATIONS)
    for place in range(2):
        own = set(found.chosen.of(place).tolist())
        worst = max(float(before[n]) for n in (own if method == "contribution" else found.chosen.neurons.tolist()))
        assert found.cut[place] == (worst if method == "lape" else -worst)
        overlaps, times = [], dict.fromkeys(own, 0)
        for replicate in range(1 + PERMUTATIONS, 1 + PERMUTATIONS + BOOTSTRAPS):
            sums, tokens = totals.sums[replicate], totals.tokens[replicate]
            if method == "lape":
                other = lape.choose(sums, tokens, settings.rate, settings.bar)
            else:
                other = contrast.choose(lape.probabilities(sums, tokens), settings.rate)
            again = set(other.of(place).tolist())
            overlaps.append(len(own & again) / len(own | again))
            for neuron in own & again:
                times[neuron] += 1
        assert found.overlap[place] == pytest.approx(np.mean(overlaps))
        for neuron, count in times.items():
            assert found.stability[neuron, place] == count / BOOTSTRAPS


def test_a_label_without_neurons_has_no_cut():
    """And not one that JSON can't hold."""
    found, _, _ = chosen("contribution", {}, rate=1e-6)
    facts = {"label_kind": "k", "method": "contribution", "module": "language", "modality": "text"}
    rows = label_rows(found, ("x", "y"), {"x": 1, "y": 1}, (NEURONS,), facts).to_pylist()
    assert [(row["neurons"], row["cut"]) for row in rows] == [(0, None), (0, None)]
