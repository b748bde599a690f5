"""A model's captions share rows if an example shows that nothing changes, and the reason is said if it does."""

import pytest

from mmray.models import packing
from mmray.models.tiny.variants import VARIANTS
from mmray.neurons import row_sharing
from mmray.neurons.row_sharing import RowSharing


@pytest.mark.parametrize("variant", ["demo", *VARIANTS])
def test_families_with_the_image_in_a_causal_decoder_share_rows(open_model, variant):
    sharing = RowSharing(open_model(variant))
    if variant.endswith("_t5") or variant == "mllama":
        assert sharing.problem == "the family's inputs can't be written for shared rows"
        return
    assert sharing.problem == ""


def test_a_model_that_ignores_the_mask_shares_nothing(open_model, monkeypatch):
    model = open_model("llava")
    # Every token sees those before it in the row, whatever its path.
    visible = packing._visible
    monkeypatch.setattr(packing, "_visible", lambda tree, total, blocks: visible(tree, total, [(0, total)]))
    assert "activations differ by" in RowSharing(model).problem


def test_a_model_that_refuses_the_mask_shares_nothing(open_model, monkeypatch):
    forward = row_sharing.forward

    def refuse(model, batch):
        if batch.paths is not None:
            raise ValueError("flash attention\ntakes no mask")
        return forward(model, batch)

    monkeypatch.setattr(row_sharing, "forward", refuse)
    assert RowSharing(open_model("llava")).problem == (
        "a forward with shared rows fails (flash attention takes no mask)"
    )
