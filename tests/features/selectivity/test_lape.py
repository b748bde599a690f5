"""The published selection: against the formulas in plain Python, and against the authors' steps, to the bit."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mmray.features.selectivity.lape import bar_of, choose, entropies, probabilities

SIZES = [(1, 100, 2), (2, 64, 4), (4, 333, 7), (32, 1024, 6)]
"""Layers, width, labels."""


def table(layers, width, labels, seed, highest=None):
    """Random counts; with few values there are many ties, and some neurons are never active."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(500, 2000, (labels,), generator=random)
    share = torch.rand(layers * width, labels, generator=random) ** 4
    active = (share * tokens).long()
    if highest is not None:
        active = torch.randint(0, highest + 1, (layers * width, labels), generator=random)
        tokens = torch.full((labels,), 64)
    return active, tokens


def by_formula(active, tokens, rate, quantile):
    """Return methods' §3.1 without a tensor: (entropy or infinity by neuron, bar, own labels by neuron)."""
    p = [[count / total for count, total in zip(row, tokens, strict=True)] for row in active]
    flat = sorted(value for row in p for value in row)
    bar = flat[round(quantile * len(flat)) - 1]
    found = []
    for row in p:
        total = sum(row)
        shares = [value / total for value in row] if total else [0.0] * len(row)
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        found.append(entropy if any(value > bar for value in row) else math.inf)
    return found, bar, [[number for number, value in enumerate(row) if value > bar] for row in p]


def as_released(over_zero, n, rate, quantile):
    """Return (row, column) of the neurons and their labels by the steps of the authors' code, float64 for float32."""
    activation_probs = over_zero.double() / n.double()
    normed = activation_probs / activation_probs.sum(dim=-1, keepdim=True)
    normed[torch.isnan(normed)] = 0
    log_probs = torch.where(normed > 0, normed.log(), 0)
    entropy = -torch.sum(normed * log_probs, dim=-1)
    flattened = activation_probs.flatten()
    top = flattened.kthvalue(round(len(flattened) * quantile)).values.item()
    entropy[(activation_probs > top).sum(dim=-1) == 0] = torch.inf
    flat = entropy.flatten()
    _, index = flat.topk(round(len(flat) * rate), largest=False)
    rows, columns = index // entropy.size(1), index % entropy.size(1)
    label, place = torch.where(activation_probs[rows, columns].transpose(0, 1) > top)
    return [[(int(rows[i]), int(columns[i])) for i in place[label == k]] for k in range(over_zero.size(2))]


@pytest.mark.parametrize(("layers", "width", "labels"), SIZES)
@pytest.mark.parametrize("highest", [None, 3, 40])
def test_the_authors_steps_to_the_bit(layers, width, labels, highest):
    for seed in range(3):
        active, tokens = table(layers, width, labels, seed, highest)
        chosen = choose(active, tokens)
        expected = as_released(active.reshape(layers, width, labels), tokens, 0.01, 0.95)
        for label in range(labels):
            own = [divmod(neuron, width) for neuron in chosen.of(label).tolist()]
            assert own == expected[label]


@pytest.mark.parametrize(("layers", "width", "labels"), SIZES[:3])
@pytest.mark.parametrize("highest", [None, 3, 40])
def test_the_formulas(layers, width, labels, highest):
    for seed in range(5):
        active, tokens = table(layers, width, labels, 10 + seed, highest)
        chosen = choose(active, tokens)
        entropy, bar, own = by_formula(active.tolist(), tokens.tolist(), 0.01, 0.95)
        assert bar_of(probabilities(active, tokens)) == bar
        count = round(0.01 * layers * width)
        assert len(chosen.neurons) == count == len(set(chosen.neurons.tolist()))
        # Of equal entropies any may be taken, so what is fixed is the entropies, and every neuron below the last.
        found = sorted(entropy[neuron] for neuron in chosen.neurons.tolist())
        lowest = sorted(entropy)[:count]
        assert found == pytest.approx(lowest, abs=1e-12)
        below = {number for number, value in enumerate(entropy) if value < lowest[-1] - 1e-12}
        assert below <= set(chosen.neurons.tolist())
        for neuron, member in zip(chosen.neurons.tolist(), chosen.member.tolist(), strict=True):
            assert [label for label, is_own in enumerate(member) if is_own] == own[neuron]


@pytest.mark.parametrize(
    ("layers", "width", "union"), [(32, 11008, 3523), (40, 13824, 5530), (32, 14336, 4588), (30, 16384, 4915)]
)
def test_the_union_has_the_published_size(layers, width, union):
    random = torch.Generator().manual_seed(0)
    active = (torch.rand(layers * width, 7, generator=random) ** 3 * 1e6).long()
    chosen = choose(active, torch.full((7,), 10**6))
    assert chosen.member.any(dim=1).sum() == len(chosen.neurons) == union


def test_where_too_few_exceed_the_bar_the_rest_belong_to_no_label():
    active = torch.full((200, 2), 5)
    active[7] = torch.tensor([9, 0])
    chosen = choose(active, torch.tensor([10, 10]), rate=0.02)
    assert chosen.of(0).tolist() == [7]
    assert chosen.of(1).tolist() == []
    assert len(chosen.neurons) == 4


def test_a_label_without_tokens_owns_nothing():
    active, _ = table(1, 200, 3, 0)
    active[:, 1] = 0
    assert not choose(active, torch.tensor([2000, 0, 2000])).member[:, 1].any()


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6), st.integers(2, 9))
def test_entropy_is_of_shares_alone(amounts, factor):
    row = torch.tensor([amounts], dtype=torch.float64)
    entropy = float(entropies(row)[0])
    assert 0 <= entropy + 1e-12 <= math.log(len(amounts)) + 2e-12
    assert float(entropies(row * factor)[0]) == pytest.approx(entropy, abs=1e-12)
    assert float(entropies(row.flip(1))[0]) == pytest.approx(entropy, abs=1e-12)
    if sum(value > 0 for value in amounts) <= 1:
        assert entropy == 0
