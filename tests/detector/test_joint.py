"""The joint model is the plain model as long as the embedding is its own; its heads are for one model alone."""

import json
import shutil

import pytest
import torch

from jobs.demo.heads import measure_heads
from mmray.demo import DETECTOR
from mmray.detector.heads import FACTS, WEIGHTS
from mmray.detector.joint import JointModel, join, join_if_given
from mmray.detector.vision_tower import OwnTower
from mmray.errors import InputError
from mmray.models.generation import caption_of, generate
from mmray.models.norms import vocabulary_logits
from mmray.models.prompting import encode, prompt_text, tokenize_caption

CAPTIONS = ("An image of a dog.", "An image", "An image of a cat and a house.")


def encoded(model, images, captions):
    before = prompt_text(model, None, "en")
    pairs = [tokenize_caption(model, before, caption) if caption else ([], []) for caption in captions]
    tokens, offsets = (list(part) for part in zip(*pairs, strict=True))
    return encode(model, [before] * len(images), images, tokens, offsets)


@pytest.mark.parametrize("name", ["demo", "llava", "vipllava"])
def test_logits_are_bit_equal_to_the_plain_model_s(name, open_model, images):
    model = open_model(name)
    sight = OwnTower(model)
    joint = JointModel(model, torch.nn.Identity(), sight, sight.projector)
    batch = encoded(model, images[:3], CAPTIONS)
    with torch.no_grad():
        plain = model.network(**batch.to(model.device, model.network.dtype)).logits
        own = joint.logits(batch, joint.embed(joint.pixels(images[:3])))
    assert torch.equal(plain, own)


def test_what_it_writes_is_what_the_plain_model_writes(joint, images):
    model = joint.model
    batch = encoded(model, images[:4], [""] * 4)
    before = prompt_text(model, None, "en")
    seen = joint.embed(joint.pixels(images[:4]))
    written, states = joint.generate(batch, seen)
    assert written == generate(model, [before] * 4, images[:4])
    assert joint.generate(batch, torch.zeros_like(seen))[0] != written
    for row, tokens in enumerate(written):
        logits = vocabulary_logits(model, states[row, : len(tokens)])
        assert logits.argmax(dim=1).tolist() == tokens
        taught = encode(model, [before], images[row : row + 1], [tokens], [caption_of(model, tokens)[1]])
        plain = joint.logits(taught, seen[row : row + 1])[0, taught.caption_start[0] - 1 :][: len(tokens)]
        torch.testing.assert_close(logits, plain.detach(), atol=1e-3, rtol=1e-4)


def test_words_are_sought_in_lower_case(joint):
    assert torch.equal(joint.detector.queries(["Dog", " dog "]), joint.detector.queries(["dog", "dog"]))


def test_gradients_are_those_in_the_embedding_and_of_no_weight(joint, images):
    batch = encoded(joint.model, images[:1], CAPTIONS[:1])
    seen = joint.embed(joint.pixels(images[:1])).requires_grad_()
    loss = joint.logits(batch, seen)[0, -2].max() + joint.detect(seen, ["dog"]).logits.max()
    loss.backward()
    assert seen.grad is not None and seen.grad.abs().max() > 0
    weights = [*joint.model.network.parameters(), *joint.detector.parameters()]
    assert not any(weight.requires_grad or weight.grad is not None for weight in weights)


def test_an_embedding_of_another_grid_is_refused(joint, images):
    batch = encoded(joint.model, images[:1], CAPTIONS[:1])
    seen = joint.embed(joint.pixels(images[:1]))
    with pytest.raises(InputError, match="63 image tokens for 64 positions"):
        joint.logits(batch, seen[:, 1:])


def test_heads_find_what_fresh_scenes_show(joint):
    found = measure_heads(joint.detector, joint.tower, 128, seed=551_000)
    assert found.pointing >= 0.93 and found.recall >= 0.85 and found.presence >= 0.9, found


def test_heads_of_another_model_are_refused(tmp_path, demo, open_model):
    with pytest.raises(InputError, match="heads of another model"):
        join(open_model("llava"), str(DETECTOR))
    shutil.copytree(DETECTOR, tmp_path / "heads")
    told = json.loads((tmp_path / "heads" / FACTS).read_text())
    (tmp_path / "heads" / FACTS).write_text(json.dumps(told | {"shape": told["shape"] | {"hidden": 96}}))
    with pytest.raises(InputError, match="do not have the shape"):
        join(demo, str(tmp_path / "heads"))
    (tmp_path / "heads" / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(InputError, match="no detector heads"):
        join(demo, str(tmp_path / "heads"))


def test_an_alignment_that_nothing_would_use_is_refused(demo, open_model):
    with pytest.raises(InputError, match="--alignment W: the detector demo sees by demo's own tower"):
        join(demo, "demo", "W")
    with pytest.raises(InputError, match="--alignment W: give the OWL-ViT or OWLv2"):
        join_if_given(open_model("llava"), None, "W")
    assert join_if_given(open_model("llava"), None, None) is None


def test_a_family_without_a_projector_of_its_own_is_refused(open_model):
    with pytest.raises(InputError, match="detector heads need a LLaVA"):
        OwnTower(open_model("qwen2_vl"))


@pytest.mark.parametrize("words", [[], [" "]])
def test_no_word_is_refused(joint, words):
    with pytest.raises(InputError, match="an empty word, or none"):
        joint.detector.queries(words)
