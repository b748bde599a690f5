"""Looking at candidates gives what looking at the whole vocabulary gives."""

import pytest
import torch

from mmray.features.editing import candidates as module
from mmray.features.editing.candidates import candidates, log_rest
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import resume
from mmray.features.editing.training import KeptPositions
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import CAPTIONS, batch_of

FEW = 3


def kept(model, per_position, monkeypatch):
    """Return kept answers of a batch, and deltas of the last layer."""
    monkeypatch.setattr(module, "PER_POSITION", per_position)
    deltas = Deltas(model, [(len(model.widths) - 1, unit) for unit in (3, 7, 20)])
    part = resume(model, batch_of(model, CAPTIONS[:2])[0], deltas)
    chosen, (total,) = candidates(model, [part], [1, 2])
    answers = KeptPositions.of(part, chosen, total, 1.0)
    answers.refresh(deltas, len(part.targets), torch.Generator().manual_seed(0))
    deltas.parameters[deltas.first][0].data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return part, chosen, answers, deltas


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_tokens_as_candidates_give_the_divergence_over_the_vocabulary(open_model, variant, monkeypatch):
    part, chosen, answers, deltas = kept(open_model(variant), 10**6, monkeypatch)
    with torch.no_grad():
        before, after = (one.log_softmax(1) for one in (answers.near.logits(), answers.near.logits(deltas)))
        expected = (before.exp() * (before - after)).sum(1).mean()
        assert torch.allclose(chosen.logits(part.states(deltas)), part.logits(deltas)[:, chosen.tokens], atol=1e-4)
        assert float(answers.divergence(deltas)) == pytest.approx(float(expected), rel=1e-2, abs=1e-5)
    assert float(expected) > 0


def test_few_candidates_count_the_rest_as_one_token(open_model, monkeypatch):
    model = open_model("llava")
    part, chosen, answers, deltas = kept(model, FEW, monkeypatch)
    logits = part.logits()
    assert FEW <= len(chosen.tokens) < logits.shape[1]
    assert chosen.numbers(torch.tensor([-1, 1])).tolist() == [-1, chosen.tokens.tolist().index(1)]
    others = torch.ones(logits.shape[1], dtype=torch.bool)
    others[chosen.tokens] = False
    rest = log_rest(logits.logsumexp(1), logits[:, chosen.tokens])
    assert torch.allclose(rest, logits[:, others].logsumexp(1), atol=1e-3)
    assert torch.allclose(answers.before.exp().sum(1), torch.ones(len(answers.before)), atol=1e-4)
    for name in deltas.parameters:
        deltas.parameters[name][0].data.zero_()
    assert float(answers.divergence(deltas).detach()) == pytest.approx(0, abs=1e-6)
