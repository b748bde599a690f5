"""Heads are trained on embeddings as they are and, to harden them, a bounded way along the loss's gradient."""

import pytest
import torch

from jobs.demo import heads as training
from jobs.demo.heads import Chunk, detection_loss
from mmray.detector.detection import Detection
from mmray.detector.heads import Heads

SCENES, SIDE, WIDTH, WORDS = 3, 4, 24, 5


@pytest.fixture
def demo(open_model):
    return open_model("demo")


@pytest.fixture
def heads(demo) -> Heads:
    torch.manual_seed(1)
    return Heads(demo, SIDE, WIDTH, hidden=48)


@pytest.fixture
def batch() -> Chunk:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]])
    objects = torch.tensor([[0, 1, -1], [2, 3, -1], [4, 0, -1]])
    return Chunk(torch.randn(SCENES, SIDE**2, WIDTH).half(), objects, boxes.expand(SCENES, 3, 4))


@pytest.mark.parametrize("hardening", [False, True])
def test_gradients_are_those_of_the_batch_and_when_hardening_of_harder_ones_near_it(heads, batch, hardening):
    words = heads.word_embeddings(["dog", "cat", "sun", "pizza", "rose"])
    seen: list[torch.Tensor] = []  # the embeddings of each pass
    heads.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))

    def loss_of(embeddings: torch.Tensor) -> torch.Tensor:
        queries = heads.project(words)
        with torch.autocast("cpu", torch.bfloat16):
            found = heads(embeddings, queries)
        return detection_loss(Detection(*(part.float() for part in found)), batch, SIDE)

    told = training.train_on(heads, batch, words, adversarial=hardening)
    given = {name: weight.grad.clone() for name, weight in heads.named_parameters()}
    heads.zero_grad()
    plain, moved = seen[0], seen[-1]
    assert torch.equal(plain, batch.embeddings.float())
    assert len(seen) == (2 + training.ATTACK_STEPS if hardening else 1)
    losses = [loss_of(plain), loss_of(moved)][: 1 + hardening]
    assert told == losses[0].item()
    sum(losses).backward()
    for name, weight in heads.named_parameters():
        torch.testing.assert_close(given[name], weight.grad, rtol=2e-2, atol=1e-3)
    if hardening:
        far = (moved - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        assert (far > 0).all()
        assert (far <= training.MAX_RADIUS * (1 + 1e-5)).all()
        assert losses[1] > losses[0]
        # No way as long, drawn at random, is as hard.
        way = torch.randn_like(plain).flatten(1)
        drawn = plain + (way / way.norm(dim=1, keepdim=True) * (moved - plain).flatten(1).norm(dim=1)[:, None]).reshape(
            plain.shape
        )
        assert losses[1] > loss_of(drawn)
