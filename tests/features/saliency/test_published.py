"""Gradient alignment with an OWL-ViT against the published similarities, from the detector's own forward pass."""

import pytest
import torch
from transformers import OwlViTForObjectDetection

from mmray.detector.owl import QUERY, open_owl
from mmray.features.saliency.gradient_alignment import box_cosines
from mmray.features.saliency.methods import METHODS


class Planted:
    """The evidence of one word, whose gradient is given."""

    def __init__(self, owl, features, gradient):
        self.joint = self.input = self
        self.detector, self.tower, self.features, self.gradients = owl.detector, owl.tower, features, [gradient]
        self.targets = [type("Target", (), {"row": 0})]

    def query(self, _):
        return self.detector.queries(["dog"])


def published(folder, owl, pixels, gradient):
    """Return cosines [box, logit + 4] of the published code: of the detector's outputs as transformers returns them."""
    network = OwlViTForObjectDetection.from_pretrained(folder).eval()
    words = owl.detector.processor.tokenizer(
        [QUERY.format("dog")], padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    outputs = network(pixel_values=pixels, **words, output_hidden_states=True)
    embedding = outputs.vision_model_output.hidden_states[-2]
    rows = []
    for box in range(outputs.pred_boxes.shape[1]):
        of_box = [outputs.logits[0, box, 0], *outputs.pred_boxes[0, box]]
        grads = [torch.autograd.grad(one, embedding, retain_graph=True)[0][0, 1:] for one in of_box]
        rows.append([torch.nn.functional.cosine_similarity(g.flatten(), gradient.flatten(), dim=0) for g in grads])
    return torch.tensor(rows), outputs.pred_boxes[0].detach()


@pytest.fixture(scope="module")
def similarities(owl):
    folder = owl("owlvit")
    found = open_owl(str(folder), "cpu")
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(1, 3, 24, 24, generator=generator)
    pixels = torch.nn.functional.interpolate(pixels, size=found.detector.network.config.vision_config.image_size)
    features = found.tower(pixels)
    gradient = torch.randn(features[0, 1:].shape, generator=generator)
    return *published(folder, found, pixels, gradient), Planted(found, features, gradient)


def test_cosines_are_those_of_the_logit_and_of_centre_width_and_height(similarities):
    expected, places, planted = similarities
    found, boxes = box_cosines(planted.detector, planted.features[0], planted.query(0), planted.gradients[0], "any", 1)
    assert torch.allclose(found, expected, atol=1e-4)
    centres = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)
    assert torch.allclose(centres, places, atol=1e-5)
    # The gradients of a corner are others, so the comparison can fail.
    corner = torch.cat([boxes[:, :2], boxes[:, 2:]], dim=1)
    assert not torch.allclose(corner, places, atol=1e-3)


@pytest.mark.parametrize("method", ["alignment", "alignment-boxes", "alignment-any"])
def test_boxes_weigh_as_published(similarities, method):
    expected, _, planted = similarities
    logit, places = expected[:, :1], expected[:, 1:]
    scaled = [(part - part.min()) / (part.max() - part.min()) for part in (logit, places)]
    weights = {"alignment": logit, "alignment-boxes": scaled[1], "alignment-any": torch.cat(scaled, dim=1)}[method]
    found = METHODS[method](planted, 0).weights
    assert torch.allclose(found, weights.max(dim=1).values, atol=1e-3)
    # Raw cosines would prefer another box: their two kinds differ in size.
    if method == "alignment-any":
        assert not torch.allclose(found, expected.max(dim=1).values, atol=1e-2)
