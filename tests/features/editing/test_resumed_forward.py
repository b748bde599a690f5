"""What is run again after the first edited MLP is what the whole network computes, in every family, edited or not."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from mmray.features.editing.baselines import RankOne
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.edit import Purpose, WeightEdit
from mmray.features.editing.generation_cache import record_generation
from mmray.features.editing.resumed_forward import joined, resume, resume_all
from mmray.models.generation import generate
from mmray.models.loading import digest
from mmray.models.prompting import prompt_text
from mmray.models.tiny.variants import VARIANTS
from tests.support.samples import CAPTIONS, batch_of, picture, png

NEURONS = {"last": [(1, 3), (1, 20), (1, 7)], "both": [(0, 5), (1, 3), (0, 11)], "first": [(0, 2)]}


def as_edit(model, deltas):
    """Return the deltas as an edit of the weights."""
    layers = [torch.full_like(units, layer) for layer, units in deltas.units.items()]
    rows = torch.cat([deltas.rows(layer).detach() for layer in deltas.units])
    units = torch.cat(list(deltas.units.values()))
    return WeightEdit(torch.cat(layers), units, rows, (Purpose("noise"),), digest(model.folder))


def whole(model, batch):
    """Return the logits at the places that predict caption tokens, from one forward of the network."""
    with torch.inference_mode():
        logits = model.network(**batch.to(model.device, model.network.dtype)).logits.float()
    rows = zip(logits, batch.caption_start, batch.tokens, strict=True)
    return torch.cat([row[start - 1 : start - 1 + len(tokens)] for row, start, tokens in rows])


def filled(model, neurons):
    deltas = Deltas(model, neurons)
    generator = torch.Generator().manual_seed(0)
    for layer in deltas.units:
        deltas.parameters[layer][0].data.normal_(std=0.3, generator=generator)
    return deltas


@pytest.mark.parametrize("where", NEURONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tail_is_the_network(open_model, variant, where):
    model = open_model(variant)
    batch, _ = batch_of(model, CAPTIONS[:3])
    deltas = filled(model, NEURONS[where])
    rest = resume(model, batch, deltas)
    plain = whole(model, batch)
    with torch.no_grad():
        assert torch.allclose(rest.logits(), plain, rtol=1e-4, atol=1e-5)
        edited = rest.logits(deltas)
    with as_edit(model, deltas).applied(model):
        expected = whole(model, batch)
    assert torch.allclose(edited, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(whole(model, batch), plain)


@pytest.mark.parametrize("variant", ["llava", "gemma3"])
def test_tails_are_joined_and_cut(open_model, variant):
    model = open_model(variant)
    deltas = filled(model, NEURONS["last"])
    parts = [resume(model, batch_of(model, CAPTIONS[start : start + 2])[0], deltas) for start in (0, 2)]
    with torch.no_grad():
        apart = torch.cat([part.logits(deltas) for part in parts])
        together = joined(parts)
        assert torch.allclose(together.logits(deltas), apart, atol=1e-5)
        chosen = torch.tensor([4, 0, 9])
        assert torch.allclose(together.at(chosen).logits(deltas), apart[chosen], atol=1e-5)
    assert sorted(set(together.rows.tolist())) == [0, 1, 2, 3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_heard_is_what_a_forward_gives(open_model, variant):
    model = open_model(variant)
    prompts, images = [prompt_text(model, None, "en")] * 3, [picture(seed) for seed in range(3)]
    with record_generation(model) as recorder:
        written = generate(model, prompts, images, 5)
    answers = [
        Example(prompt, png(image), tuple(tokens), cache=recorder.of(row, len(tokens)))
        for row, (prompt, image, tokens) in enumerate(zip(prompts, images, written, strict=True))
        if tokens
    ]
    silent = model.parts.encoder_decoder or bool(model.projections[1].experts)
    assert [answer.cache is None for answer in answers] == [silent] * len(answers)
    deltas = filled(model, NEURONS["last"])
    for answer in answers:
        ((recalled, _),) = resume_all(model, [answer], deltas)
        ((forward, _),) = resume_all(model, [replace(answer, cache=None)], deltas)
        assert torch.equal(recalled.targets, forward.targets)
        with torch.no_grad():
            assert torch.allclose(recalled.logits(deltas), forward.logits(deltas), rtol=1e-3, atol=1e-4)
    assert answers
    assert recorder.of(0, 6) is None
    with patch.object(model.network.generation_config, "guidance_scale", 1.0), record_generation(model) as recorder:
        generate(model, prompts, images, 5)
    assert recorder.of(0, 1) is None


def test_the_loss_reaches_every_delta(open_model):
    model = open_model("llava")
    deltas = Deltas(model, NEURONS["both"])
    batch, _ = batch_of(model, CAPTIONS[:2])
    resume(model, batch, deltas).logits(deltas).square().sum().backward()
    assert all(bool(learnt.grad.abs().sum(dim=1).gt(0).all()) for (learnt,) in deltas.parameters.values())


def test_rank_one_rows_are_a_product(open_model):
    model = open_model("llava")
    direction = torch.linspace(0, 1, model.widths[1])
    deltas = RankOne(model, 1, direction)
    deltas.parameters[1][0].data.fill_(0.5)
    rows = deltas.rows(1)
    assert torch.linalg.matrix_rank(rows.detach()) == 1
    assert torch.equal(rows.detach()[:, 0], direction * 0.5)
