"""Packed weights change no product but by rounding, and are gone after the block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mmray.models import packed_linear
from mmray.models.packed_linear import packed_linears

pytestmark = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="packs only where PyTorch has both MKL and oneDNN, as on x86",
)


class Doubled(nn.Linear):
    """A subclass with arithmetic of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Quantised(torch.Tensor):
    """A weight in a format of its own."""


@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_differ_by_rounding_alone(shape, sizes, bias, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(*sizes, bias)
    # A view with strides of its own, as attention hands over.
    states = torch.randn(*shape, sizes[0], 2)[..., 0]
    with torch.no_grad():
        expected = linear(states)
        with packed_linears(linear):
            assert "forward" in vars(linear)
            torch.testing.assert_close(linear(states), expected)


def test_only_dense_fp32_layers_of_a_plain_type_are_packed():
    layers = [nn.Linear(4, 4), Doubled(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, device="meta")]
    layers.append(nn.Linear(4, 4))
    # As torchao does: the weight's type is its own, and its dtype that of the products.
    layers[-1].weight = nn.Parameter(layers[-1].weight.detach().as_subclass(Quantised))
    with packed_linears(nn.ModuleList(layers)):
        assert ["forward" in vars(layer) for layer in layers] == [True, False, False, False, False]


def test_hooks_are_called_and_later_changes_of_weights_count():
    linear, seen = nn.Linear(4, 3), []
    linear.register_forward_hook(lambda *call: seen.append(call[2]))
    states = torch.randn(2, 4)
    with torch.no_grad():
        with packed_linears(linear):
            # A second time inside the block: nothing is packed twice, or unpacked early.
            with packed_linears(linear):
                linear(states)
            assert "forward" in vars(linear)
        linear.weight.zero_()
        assert torch.equal(linear(states), linear.bias.expand(2, 3))
    assert len(seen) == 2


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_those_of_the_plain_layer(frozen):
    linear = nn.Linear(4, 3).requires_grad_(not frozen)
    states = torch.randn(2, 4, requires_grad=frozen)
    with packed_linears(linear):
        linear(states).sum().backward()
    if frozen:
        torch.testing.assert_close(states.grad, linear.weight.sum(0).expand(2, 4))
    else:
        torch.testing.assert_close(linear.weight.grad, states.sum(0).expand(3, 4))


def test_a_failure_leaves_the_layers_as_they_were():
    linear = nn.Linear(4, 3)
    with pytest.raises(KeyError), packed_linears(linear):
        raise KeyError
    assert "forward" not in vars(linear)


def test_networks_whose_copy_would_take_much_memory_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(packed_linear, "LARGEST", 4 * 16 - 1)
    linear = nn.Linear(4, 4)
    with packed_linears(linear):
        assert "forward" not in vars(linear)
