"""Controls of a mask: as many random neurons of each layer, and none of its own while others are left."""

import numpy as np
import pytest

from mmray.features.selectivity.masks import locate_neurons, random_like

WIDTHS = (10, 4, 20)


@pytest.mark.parametrize("seed", range(5))
def test_random_neurons_are_as_many_of_each_layer_and_others(seed):
    generator = np.random.default_rng(seed)
    own = np.sort(generator.choice(34, 12, replace=False))
    drawn = random_like(own, WIDTHS, generator)
    layers = [layer for layer, _ in locate_neurons(own, WIDTHS)]
    assert sorted(layer for layer, _ in locate_neurons(drawn, WIDTHS)) == sorted(layers)
    assert len(set(drawn.tolist())) == len(drawn)
    for layer, (start, width) in enumerate(zip((0, 10, 14), WIDTHS, strict=True)):
        if layers.count(layer) <= width // 2:
            inside = {int(n) for n in drawn if start <= n < start + width}
            assert not inside & set(own.tolist())


def test_a_whole_layer_has_no_others():
    own = np.arange(10, 14)
    assert sorted(random_like(own, WIDTHS, np.random.default_rng(0)).tolist()) == own.tolist()


def test_names_are_layer_and_unit():
    assert locate_neurons([0, 9, 10, 13, 14, 33], WIDTHS) == ((0, 0), (0, 9), (1, 0), (1, 3), (2, 0), (2, 19))
