"""A tiny OWL-ViT and a tiny LLaVA as one joint model: cut where it changes nothing, and explained as a whole."""

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from mmray.detector.joint import JointModel, join
from mmray.detector.owl import QUERY, open_owl
from mmray.errors import InputError
from mmray.features.saliency.methods import METHODS
from mmray.features.saliency.model import explain
from mmray.features.saliency.saliency_input import target_of
from mmray.models.tiny.pieces import WIDTH

CAPTION = "A dog and a red ball."


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


class Patches(nn.Module):
    """Stands for an aligned network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.layer(embedding[:, 1:])


@pytest.fixture
def joined(owl, open_model):
    def make(kind: str) -> JointModel:
        found = open_owl(str(owl(kind)), "cpu")
        return JointModel(open_model("llava"), found.detector, found.tower, Patches().requires_grad_(False))

    return make


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
def test_the_two_parts_detect_what_the_whole_does(owl, picture, kind):
    folder = owl(kind)
    found = open_owl(str(folder), "cpu")
    network = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    words = ["dog", "red ball"]
    inputs = processor(text=[[QUERY.format(word) for word in words]], images=picture, return_tensors="pt")
    with torch.no_grad():
        whole = network(**inputs)
        cut = found.detector(found.tower(found.tower.pixels([picture])), found.detector.queries(words))
    middle = cut.boxes[..., :2] + cut.boxes[..., 2:] / 2
    assert torch.allclose(cut.logits, whole.logits, atol=1e-5)
    assert torch.allclose(torch.cat([middle, cut.boxes[..., 2:]], dim=2), whole.pred_boxes, atol=1e-5)


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
def test_every_method_explains_a_word_of_the_joint_model(joined, picture, kind):
    joint = joined(kind)
    answer = explain(joint.model, joint, picture, "dog", CAPTION)
    assert set(answer.maps) == set(METHODS)
    for method, saliency in answer.maps.items():
        assert saliency.values.isfinite().all(), method
        assert saliency.values.min() < saliency.values.max(), method
    assert answer.maps["alignment"].weights.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
def test_alignment_is_the_cosine_of_two_gradients_box_by_box(joined, picture, kind):
    """Over the patches alone: with CLS, which the language model never sees, all cosines would shrink."""
    joint = joined(kind)
    answer = explain(joint.model, joint, picture, "dog", CAPTION, methods=("alignment",))
    batch, (target,) = target_of(joint.model, picture, CAPTION, "dog")
    leaf = joint.embed(joint.pixels([picture])).requires_grad_()
    (word,) = torch.autograd.grad(joint.logits(batch, leaf)[0, target.position, target.token], leaf)
    logits = joint.detector(leaf, joint.detector.queries(["dog"])).logits[0, :, 0]
    for logit, weight in zip(logits, answer.maps["alignment"].weights, strict=True):
        (box,) = torch.autograd.grad(logit, leaf, retain_graph=True)
        assert box[0, 0].abs().max() > 0 and not word[0, 0].any()
        expected = torch.cosine_similarity(box[0, 1:].flatten(), word[0, 1:].flatten(), dim=0)
        assert torch.allclose(weight, expected, atol=1e-5)


def test_what_is_no_detector_is_refused(tiny, open_model):
    with pytest.raises(InputError, match="neither OWL-ViT nor OWLv2"):
        open_owl(str(tiny("llava")), "cpu")
    with pytest.raises(InputError, match="no such model folder"):
        join(open_model("llava"), "/nowhere")
