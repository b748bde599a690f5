"""W: what it learns from, the loss of shared rows, its files, and a model that sees through it."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmray.detector.alignment import (
    WEIGHTS,
    Alignment,
    Pair,
    alignment_digest,
    alignment_loss,
    load_alignment,
    optimiser,
    save_alignment,
)
from mmray.detector.joint import join
from mmray.detector.vision_tower import OwnTower, open_tower
from mmray.errors import InputError
from mmray.features.alignment.tower_swap import TowerSwap
from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.queries import Query
from mmray.features.saliency.model import explain, load_model
from mmray.models.loading import digest
from mmray.models.prompting import prompt_text
from mmray.neurons.heatmaps import placed
from mmray.storage import open_store

MEASURED = {"recall": {"before": 1.0, "after": 1.0, "n": 1}}


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    random = torch.Generator().manual_seed(3)
    return [
        Image.fromarray(torch.randint(256, (height, width, 3), generator=random, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


@pytest.fixture
def pair(open_model) -> Pair:
    model = open_model("llava")
    return Pair(OwnTower(model), model)


def test_a_models_own_tower_needs_its_own_projector(pair):
    embedding, tokens = pair.examples(pictures((32, 32), (48, 30), (20, 60)))
    assert torch.equal(pair.tower.projector(embedding), tokens)
    assert float(alignment_loss(pair.tower.projector, embedding, tokens, 3)) == 0


@given(st.integers(1, 6), st.integers(0, 6))
def test_parts_add_up_to_the_mean(rows, cut):
    torch.manual_seed(rows)
    network = Alignment("mlp", 5, 7, 3, skipped=1)
    embedding, tokens = torch.randn(rows, 4, 5), torch.randn(rows, 3, 3)
    whole = torch.nn.functional.mse_loss(network(embedding), tokens)
    parts = [alignment_loss(network, embedding[part], tokens[part], rows) for part in (slice(cut), slice(cut, None))]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    gradients = [torch.autograd.grad(value, list(network.parameters())) for value in (sum(parts), whole)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_what_stands_before_the_patches_has_no_part():
    network = Alignment("projector", 5, 7, 3, skipped=1)
    embedding = torch.randn(2, 4, 5)
    other = torch.cat([torch.randn(2, 1, 5), embedding[:, 1:]], dim=1)
    assert torch.equal(network(embedding), network(other))


def test_it_is_kept_for_its_tower_and_its_model(pair, tmp_path):
    network = pair.network("mlp", 16)
    digests = {"tower": "that tower", "model": pair.model.digest}
    save_alignment(open_store(tmp_path), network, {"digests": digests})
    with pytest.raises(InputError, match="not yet compared with the original"):
        load_alignment(str(tmp_path), pair.model, "that tower")
    assert load_alignment(str(tmp_path), pair.model, "that tower", measured=False).shape == network.shape
    save_alignment(open_store(tmp_path), network, {"digests": digests, "measures": {}})
    with pytest.raises(InputError, match="not yet compared with the original"):
        load_alignment(str(tmp_path), pair.model, "that tower")
    save_alignment(open_store(tmp_path), network, {"digests": digests, "measures": MEASURED})
    embedding, _ = pair.examples(pictures((32, 32)))
    assert torch.equal(load_alignment(str(tmp_path), pair.model, "that tower")(embedding), network(embedding))
    with pytest.raises(InputError, match="aligned with another tower"):
        load_alignment(str(tmp_path), pair.model, "another")
    with pytest.raises(InputError, match="no aligned network"):
        load_alignment(str(tmp_path / "nothing"), pair.model, "that tower")


def test_its_digest_is_that_of_what_it_is(pair, tmp_path):
    """Not of when or where it was written, nor of what was measured since."""
    network, digests = pair.network("projector", 1), {"tower": "that tower", "model": "that model"}
    save_alignment(open_store(tmp_path / "one"), network, {"digests": digests})
    save_alignment(open_store(tmp_path / "two"), network, {"digests": digests, "measures": MEASURED})
    os.utime(tmp_path / "two" / WEIGHTS, (1, 1))
    found = alignment_digest(str(tmp_path / "one"))
    assert alignment_digest(str(tmp_path / "two")) == found
    save_alignment(open_store(tmp_path / "one"), network, {"digests": digests | {"tower": "another"}})
    assert alignment_digest(str(tmp_path / "one")) != found
    with torch.no_grad():
        next(network.parameters()).add_(1e-3)
    save_alignment(open_store(tmp_path / "two"), network, {"digests": digests})
    assert alignment_digest(str(tmp_path / "two")) != found
    with pytest.raises(InputError, match="no aligned network"):
        alignment_digest(str(tmp_path / "nothing"))


def test_a_model_with_its_own_sight_standing_in_says_the_same(pair):
    model = pair.model
    queries = [
        Query(str(number), prompt_text(model, question, None), image)
        for number, image in enumerate(pictures((32, 32), (40, 40)))
        for question in ("What is in the picture?", "Describe the image in few words.")
    ]
    verifier = DraftVerifier(model, 4)
    before = verifier.generate(queries)
    with TowerSwap(pair.tower, pair.tower.projector).applied(model):
        assert verifier.generate(queries) == before
    blind = pair.network("projector", 1)
    with TowerSwap(pair.tower, blind).applied(model):
        changed = verifier.states_along(queries, before)
    for one, other in zip(verifier.states_along(queries, before), changed, strict=True):
        assert not torch.allclose(one.hidden, other.hidden)


def test_both_towers_see_the_same_around_an_image_that_is_no_square(owl, open_model):
    pair = Pair(open_tower(str(owl("owlv2")), "cpu"), open_model("llava"))
    for image in pictures((32, 20), (12, 32)):
        assert torch.equal(pair.tower.pixels([pair.shared_view(image)]), pair.tower.pixels([image]))


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
def test_an_owls_embedding_gets_image_tokens(kind, owl, open_model, tmp_path):
    folder, model = owl(kind), open_model("llava")
    pair = Pair(open_tower(str(folder), "cpu"), model)
    embedding, tokens = pair.examples(pictures((32, 32), (48, 30)))
    network = pair.network("mlp", 8)
    assert embedding.shape[1] == tokens.shape[1] + pair.tower.skipped
    before = float(alignment_loss(network, embedding, tokens, 2).detach())
    learner = optimiser(network, 1e-2, 1e-2)
    for _ in range(30):
        learner.zero_grad()
        alignment_loss(network, embedding, tokens, 2).backward()
        learner.step()
    assert float(alignment_loss(network, embedding, tokens, 2).detach()) < 0.8 * before
    digests = {"tower": digest(folder), "model": model.digest}
    save_alignment(open_store(tmp_path), network, {"digests": digests, "measures": MEASURED})
    joint = join(model, str(folder), str(tmp_path))
    (picture,) = pictures((32, 32))
    caption, named = "A dog and a ball.", {"detector": str(folder), "alignment": str(tmp_path)}
    map_ = load_model(model.name).saliency(picture, caption, "dog", **named)
    answer = explain(model, joint, picture, "dog", caption, methods=("alignment",))
    assert torch.equal(map_, placed(answer.maps["alignment"].values, answer.covers, 32, 32))
    assert torch.equal(joint.tokens(embedding), network(embedding).detach())
    seen = joint.embed(joint.pixels(pictures((32, 32))))
    assert joint.detect(seen, ["dog", "cat"]).logits.shape[2] == 2
