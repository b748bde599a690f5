"""The losses of Pan et al. and FiNE, and FiNE's neurons: against the papers' formulas on the whole network."""

from dataclasses import replace
from math import log

import pytest
import torch
from torch.func import functional_call

from mmray.demo import DATA
from mmray.errors import InputError
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.published import (
    LEARNING_RATE,
    STEPS,
    FineAnswers,
    PanAnswers,
    descend,
    located_by_fine,
)
from mmray.models.prompting import prompt_text, tokenize_caption
from mmray.neurons.model import open_image
from tests.support.samples import samples_of

CAPTIONS = ("An image of a dog", "An image of a cat and a dog", "A dog")
NEW = "koala bear"


@pytest.fixture(scope="module")
def answers(demo):
    """Return captions that end in NEW instead of dog, and go on; of different lengths, each of its own image."""
    prompt, found = prompt_text(demo, None, "en"), []
    for sample, old in zip(samples_of(DATA, len(CAPTIONS)), CAPTIONS, strict=True):
        kept = old.removesuffix("dog")
        start, stop = (len(tokenize_caption(demo, prompt, text)[0]) for text in (kept.strip(), f"{kept}{NEW}"))
        rejected = tokenize_caption(demo, prompt, old)[0][start]
        tokens = tuple(tokenize_caption(demo, prompt, f"{kept}{NEW} and a house")[0])
        found.append(Example(prompt, sample.image, tokens, (start, rejected), stop, sample_id=sample.sample_id))
    assert all(example.no_repeat_from - example.rejected[0] >= 2 for example in found)
    return found


def cut(answers):
    return [replace(example, tokens=example.tokens[: example.no_repeat_from]) for example in answers]


def inputs(model, example):
    """Return the network's inputs for the prompt and the answer up to the new words' end, without mmray's batches."""
    special = not (model.tokenizer.bos_token and example.prompt.startswith(model.tokenizer.bos_token))
    image = open_image(example.image)
    found = model.processor(text=[example.prompt], images=[[image]], return_tensors="pt", add_special_tokens=special)
    said = torch.tensor([example.tokens[: example.no_repeat_from]])
    found["input_ids"] = torch.cat([found["input_ids"], said], dim=1)
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    return dict(found)


def log_probs(model, example, rows):
    """Return log-probabilities [position, token] with rows {(layer, unit): row of Δ} added to W_out."""
    weights = {}
    for (layer, unit), row in rows.items():
        path = f"{model.projections[layer].path}.weight"
        weight = weights.get(path, model.network.get_parameter(path))
        weights[path] = weight.index_add(1, torch.tensor([unit]), row[:, None])
    return functional_call(model.network, weights, kwargs=inputs(model, example)).logits[0].log_softmax(1)


def pan_loss(model, answers, rows):
    total = 0
    for example in answers:
        start, old = example.rejected
        words = example.tokens[start : example.no_repeat_from]
        found = log_probs(model, example, rows)
        # The answer ends with the new words: the last position predicts what follows them.
        predicting = found[-len(words) - 1 : -1]
        total = total - sum(predicting[number, word] for number, word in enumerate(words))
        total = total - torch.log(1 - predicting[0, old].exp())
    return total / len(answers) + 0.1 * torch.stack(list(rows.values())).norm()


def fine_loss(model, answers, rows):
    largest, again, divergences = 0, 0, []
    for example in answers:
        words = example.tokens[example.rejected[0] : example.no_repeat_from]
        before, now = log_probs(model, example, {}).detach(), log_probs(model, example, rows)
        count = len(words)
        largest = largest + max(-now[-count - 1 + number, word] for number, word in enumerate(words))
        again = again + max(-torch.log(1 - now[-1, word].exp()) for word in words)
        before, now = before[: -count - 1], now[: -count - 1]
        divergences.append((before.exp() * (before - now)).sum(1))
    size = torch.stack(list(rows.values())).norm()
    return (largest + 10 * again) / len(answers) + torch.cat(divergences).mean() + 0.1 * size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "formula", "layers"),
    [(PanAnswers, pan_loss, (4, 6)), (PanAnswers, pan_loss, (7,)), (FineAnswers, fine_loss, (2, 4))],
)
def test_losses_and_gradients_are_those_of_the_formulas(demo, answers, kind, formula, layers):
    neurons = [(layer, unit) for layer in layers for unit in (3, 50, 700)]
    deltas = Deltas(demo, neurons)
    generator = torch.Generator().manual_seed(1)
    for (parameter,) in deltas.parameters.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    rows = {
        (layer, unit): parameter[number].detach().clone().requires_grad_()
        for layer, (parameter,) in deltas.parameters.items()
        for number, unit in enumerate(deltas.units[layer].tolist())
    }
    loss, _ = kind.of(demo, cut(answers), deltas).loss(deltas)
    expected = formula(demo, answers, rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    expected.backward()
    found = torch.cat([parameter.grad for (parameter,) in deltas.parameters.values()])
    wanted = torch.stack([row.grad for row in rows.values()])
    assert wanted.abs().max() > 0.01
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))


def test_the_first_step_is_adam_s_and_learning_ends_when_all_new_tokens_are_sure(demo, answers):
    deltas = Deltas(demo, [(7, unit) for unit in range(200)])
    part = PanAnswers.of(demo, cut(answers), deltas)
    (parameter,) = deltas.parameters[7]
    part.loss(deltas)[0].backward()
    gradient = parameter.grad.clone()

    class OneStep:
        def loss(self, deltas):
            loss, _ = part.loss(deltas)
            return loss, 1.0 if not parameter.detach().any() else 0.0

    assert len(descend(deltas, [OneStep()], 0)) == 1
    # Adam's first step, from zero: the sign of the gradient times the rate.
    moved = gradient.abs() > 1e-4
    assert moved.float().mean() > 0.5
    assert torch.allclose(parameter.detach()[moved], -LEARNING_RATE * gradient.sign()[moved], rtol=1e-3)
    losses = descend(deltas, [part], 0)
    assert len(losses) < STEPS
    assert losses[-1] < losses[0]
    assert part.loss(deltas)[1] < -log(0.9)


def test_fine_locates_what_writes_the_token_that_the_model_says(demo, answers):
    layers, width = len(demo.widths) - 3, demo.widths[0]
    unembedding = demo.network.get_submodule(demo.parts.unembedding).weight
    scores = []
    for example in answers:
        seen = []
        hooks = [
            demo.network.get_submodule(projection.path).register_forward_pre_hook(
                lambda _, arguments, seen=seen: seen.append(arguments[0][0])
            )
            for projection in demo.projections
        ]
        with torch.no_grad():
            logits = demo.network(**inputs(demo, example)).logits[0]
        for hook in hooks:
            hook.remove()
        count = example.no_repeat_from - example.rejected[0]
        own = []
        for position in range(len(logits) - count - 1, len(logits) - 1):
            said = unembedding[logits[position].argmax()]
            written = [
                activation[position] * (demo.network.get_submodule(projection.path).weight.T @ said)
                for activation, projection in zip(seen, demo.projections, strict=True)
            ]
            own.append(torch.cat(written[:layers]))
        scores.append(torch.stack(own))
    expected = {
        (int(index) // width, int(index) % width)
        for token in torch.stack(scores).mean(0)
        for index in token.topk(5).indices
    }
    located = located_by_fine(demo, answers)
    assert set(located) == expected
    assert len(located) == len(expected)
    assert max(layer for layer, _ in located) < layers
    # One answer alone is the paper's single request.
    alone = located_by_fine(demo, answers[:1])
    assert set(alone) == {
        (int(index) // width, int(index) % width) for token in scores[0] for index in token.topk(5).indices
    }


def test_what_can_t_be_made_is_refused(demo, answers, open_model):
    with pytest.raises(InputError, match="leaves out the last 3 layers, and it has no others"):
        located_by_fine(open_model("llava"), answers)
    nothing_new = [replace(example, no_repeat_from=example.rejected[0]) for example in answers]
    with pytest.raises(InputError, match="write new words, and this edit has none"):
        located_by_fine(demo, nothing_new)
