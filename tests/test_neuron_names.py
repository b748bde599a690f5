"""Names of neurons: plain ones, and those within experts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmray.errors import InputError
from mmray.neuron_names import PLAIN, NeuronNames

NAMES = NeuronNames((None, (4, 24)))
"""A plain layer, and one of four experts of 24 units with a shared one after them."""


@given(st.integers(0, 1), st.integers(0, 150))
def test_a_name_says_layer_and_unit(layer, unit):
    assert NAMES.parse(NAMES.name(layer, unit)) == (layer, unit)
    # Without the expert too, as runs of earlier versions have it.
    assert NAMES.parse(PLAIN.name(layer, unit)) == (layer, unit)


@given(st.integers(0, 1), st.integers(0, 150))
def test_names_of_a_layer_are_those_of_its_neurons(layer, units):
    assert NAMES.names(layer, units).to_pylist() == [NAMES.name(layer, unit) for unit in range(units)]


def test_units_are_counted_within_their_expert():
    assert NAMES.name(0, 50) == "L0.u50"
    assert NAMES.name(1, 50) == "L1.e2.u2"
    assert NAMES.name(1, 96 + 40) == "L1.e4.u40"
    assert NeuronNames.of([None, [4, 24]]) == NAMES


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("L0.e1.u3", "layer 0 has no experts; write L0.u3"),
        ("L9.e1.u3", "layer 9 has no experts"),
        ("L1.e3.u24", "layer 1 has experts e0 to e3 of 24 units; a shared one is e4"),
        ("L1.e5.u0", "layer 1 has experts e0 to e3"),
        ("L1.e2", "write layer and unit as L7.u89, or L7.e12.u89 with an expert"),
    ],
)
def test_names_of_no_neuron_are_refused(name, why):
    with pytest.raises(InputError) as raised:
        NAMES.parse(name)
    assert why in str(raised.value)
