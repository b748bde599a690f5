"""The neurons of fused experts are read, changed and written as those of an ordinary MLP are."""

from contextlib import ExitStack

import pytest
import torch

from mmray.models.experts import changed_routed_activation, routed_activation
from mmray.models.parts import locate, output_rows, set_output_rows


@pytest.fixture
def mixture(loaded):
    """The network of experts, put back to the implementation it came with."""
    model = loaded("qwen3_vl_moe")
    implementation = model.network.config.get_text_config()._experts_implementation
    yield model
    model.network.set_experts_implementation(implementation)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_activation_times_rows_is_the_experts_output(mixture, implementation):
    network = mixture.network
    network.set_experts_implementation(implementation)
    plain = network(**mixture.inputs).logits
    for projection in locate(network).of("language"):
        module, received, outputs = network.get_submodule(projection.path), [], []
        with ExitStack() as hooks:
            hooks.enter_context(routed_activation(module, lambda seen, _, to=received: to.append(seen)))
            hooks.callback(module.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[2])).remove)
            assert torch.equal(network(**mixture.inputs).logits, plain)
        sums = received[0] @ output_rows(network, projection)
        torch.testing.assert_close(sums, outputs[0], rtol=1e-5, atol=1e-5)
        # Two of four experts see a token; the other two's units are exactly zero.
        assert received[0].unflatten(1, (projection.experts, -1)).any(-1).sum(-1).eq(2).all()


def test_changed_routed_activation_is_as_if_the_rows_were_changed(mixture):
    network, units = mixture.network, torch.tensor([0, 30, 95])
    projection = locate(network).of("language")[0]
    module = network.get_submodule(projection.path)
    weight, plain = module.down_proj.clone(), network(**mixture.inputs).logits
    with changed_routed_activation(module, units, torch.zeros_like):
        ablated = network(**mixture.inputs).logits
    assert not torch.allclose(ablated, plain)
    rows = output_rows(network, projection)[units]
    set_output_rows(network, projection, units, torch.zeros_like(rows))
    assert not output_rows(network, projection)[units].any()
    torch.testing.assert_close(network(**mixture.inputs).logits, ablated)
    set_output_rows(network, projection, units, rows)
    assert torch.equal(module.down_proj, weight)
    assert torch.equal(network(**mixture.inputs).logits, plain)


def test_blocks_without_experts_among_blocks_with(loaded):
    first, second = locate(loaded("qwen3_vl_moe").variation(mlp_only_layers=[1])).of("language")
    assert (first.experts, first.width, first.gate) == (4, 96, None)
    assert (second.experts, second.width) == (0, 48)
    assert second.gate.endswith("layers.1.mlp.gate_proj")
