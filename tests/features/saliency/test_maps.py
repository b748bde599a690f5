"""Saliency: gradients are what they are said to be, batching changes nothing, and planted maps are found."""

import pytest
import torch
from PIL import Image

import mmray
from mmray.detector.joint import join_if_given
from mmray.errors import InputError
from mmray.features.saliency.maps import cosines, paint, rollout
from mmray.features.saliency.methods import METHODS, OF_BOXES, Explained
from mmray.features.saliency.model import explain
from mmray.features.saliency.saliency_input import mentions_of, open_input, target_of
from mmray.models.prompting import encode, prompt_text, tokenize_caption
from mmray.neurons.concepts import find_forms
from mmray.neurons.heatmaps import SIDE, placed
from mmray.neurons.token_positions import positions_of


def explained_batch(model, joint, images, captions, words):
    before = prompt_text(model, None, "en")
    tokens, offsets = zip(*(tokenize_caption(model, before, caption) for caption in captions), strict=True)
    batch = encode(model, [before] * len(images), images, list(tokens), list(offsets))
    named = [("", find_forms(caption, frozenset(own), "en")) for caption, own in zip(captions, words, strict=True)]
    targets = positions_of(batch, named)
    return Explained(open_input(model, joint, batch, targets, images), [place.concept for place in targets])


def test_the_gradient_is_the_difference_quotient_of_the_logit(joint, images):
    batch, targets = target_of(joint.model, images[0], "An image of a dog.", "dog")
    given = open_input(joint.model, joint, batch, targets, images[:1])
    step = torch.randn(given.features.shape, generator=torch.Generator().manual_seed(0))
    ends = [
        joint.logits(batch, given.features + size * step)[0, targets[0].position, targets[0].token]
        for size in (1e-2, -1e-2)
    ]
    quotient = float(ends[0] - ends[1]) / 2e-2
    assert float((given.gradients[0] * step[0]).sum()) == pytest.approx(quotient, rel=0.02, abs=0.02)


@pytest.mark.slow
def test_a_place_s_maps_do_not_depend_on_what_shares_its_batch(joint, images, drawn_scenes):
    words = [scene.objects for scene in drawn_scenes[:3]]
    captions = [f"An image of a {first} and a {second}." for first, second in words]
    together = explained_batch(joint.model, joint, images[:3], captions, words)
    assert len(together.words) == 6
    alone = explained_batch(joint.model, joint, images[1:2], captions[1:2], words[1:2])
    numbers = [number for number, place in enumerate(together.input.targets) if place.row == 1]
    for name, method in METHODS.items():
        for own, number in enumerate(numbers):
            first, second = method(together, number).values, method(alone, own).values
            assert torch.allclose(first, second, atol=1e-4 * float(second.abs().max())), name


def test_the_cosine_is_1_with_itself_and_0_across(rank=5):
    own = torch.randn(rank, 3, generator=torch.Generator().manual_seed(1))
    across = torch.zeros_like(own)
    across[0, 0], across[0, 1] = -own[0, 1], own[0, 0]
    found = cosines(own, torch.stack([3 * own, -own, across, torch.zeros_like(own)]))
    assert torch.allclose(found, torch.tensor([1.0, -1.0, 0.0, 0.0]), atol=1e-6)


def test_a_point_has_the_highest_weight_of_the_boxes_over_it():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.05, 0.05]])
    map_ = paint(boxes, torch.tensor([0.2, 0.7, -0.3]))
    points = {(10, 10): 0.2, (30, 30): 0.7, (60, 60): 0.7, (88, 88): -0.3, (5, 90): -0.3}
    for (row, column), weight in points.items():
        assert map_[row, column] == pytest.approx(weight)
    assert map_.shape == (SIDE, SIDE)


def test_attention_rolls_out_to_a_distribution():
    attentions = torch.softmax(torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(2)), dim=-1)
    assert torch.allclose(rollout(list(attentions)).sum(dim=1), torch.ones(6), atol=1e-5)
    same = [torch.eye(6).expand(2, 6, 6)] * 4
    assert torch.allclose(rollout(same), torch.eye(6))


@pytest.mark.slow
def test_alignment_points_at_the_object_that_is_asked_for(joint, images, drawn_scenes):
    hits = []
    for scene, image in zip(drawn_scenes, images, strict=True):
        caption = f"An image of a {scene.objects[0]} and a {scene.objects[1]}."
        for word in scene.objects:
            values = explain(joint.model, joint, image, word, caption, methods=("alignment-any",))
            weights, boxes = values.maps["alignment-any"].weights, values.maps["alignment-any"].boxes
            centre = boxes[weights.argmax(), :2] + boxes[weights.argmax(), 2:] / 2
            left, top, width, height = scene.boxes[scene.objects.index(word)]
            hits.append(left <= centre[0] < left + width and top <= centre[1] < top + height)
    assert sum(hits) / len(hits) >= 0.85


@pytest.mark.slow
def test_a_wrong_word_has_saliency_too_and_one_that_is_not_said_is_refused(images):
    model = mmray.load_model("demo")
    for method in METHODS:
        found = model.saliency(images[0].resize((130, 80)), "An image of a zebra.", "zebra", method=method)
        assert found.shape == (80, 130) and found.isfinite().all(), method
    with pytest.raises(InputError, match="does not say 'dog'"):
        model.saliency(images[0], "An image of a zebra.", "dog")
    with pytest.raises(InputError, match="unknown saliency method 'guess'"):
        model.saliency(images[0], "An image of a zebra.", "zebra", method="guess")


@pytest.mark.parametrize("method", ["gradient", "rollout", "alignment"])
def test_python_and_the_command_look_by_the_same_sight_where_none_is_named(demo, images, method):
    asked = (images[0], "zebra", "An image of a zebra.")
    answer = explain(demo, join_if_given(demo, None, None), *asked, methods=(method,))
    found = mmray.load_model("demo").saliency(images[0], asked[2], asked[1], method=method)
    assert torch.equal(found, placed(answer.maps[method].values, answer.covers, images[0].height, images[0].width))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "paligemma", "idefics3"])
def test_families_without_a_detector_have_the_maps_of_patches(family, open_model):
    model = open_model(family)
    picture = Image.fromarray(torch.randint(256, (40, 56, 3), dtype=torch.uint8).numpy())
    batch, targets = target_of(model, picture, "A dog and a ball.", "dog")
    explained = Explained(open_input(model, None, batch, targets, [picture]), ["dog"])
    for name, method in METHODS.items():
        if name in OF_BOXES:
            with pytest.raises(InputError, match="no detector for it"):
                method(explained, 0)
        else:
            values = method(explained, 0).values
            assert values.isfinite().all() and values.max() > values.min(), name


def test_running_what_is_seen_as_it_is_changes_nothing(open_model):
    model = open_model("qwen2_vl")
    picture = Image.fromarray(torch.full((40, 56, 3), 90, dtype=torch.uint8).numpy())
    batch, targets = target_of(model, picture, "A dog and a ball.", "dog")
    given = open_input(model, None, batch, targets, [picture])
    with torch.no_grad():
        plain = model.network(**batch.to(model.device, model.network.dtype)).logits
        again = given.run(given.features).logits
    assert torch.equal(plain, again)


def test_words_are_found_as_nouns_in_any_form_and_else_as_spelt():
    assert [mention.start for mention in mentions_of("Two dogs run.", "dog")] == [4]
    assert [mention.start for mention in mentions_of("Two dogs RUN fast.", "run")] == [9]
    with pytest.raises(InputError, match="does not say"):
        mentions_of("Two dogs.", " ")
