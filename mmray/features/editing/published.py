"""Edits with the published losses: Pan et al. 2024, and FiNE (Pan et al. 2025), which is by the same authors.

Both change rows of W_out by Adam from zero, and stop once every new token has a probability of 90 %. Let y be the new
words' tokens where the model would say the old token t:

    pan     − Σ log p(y_j) − log(1 − p(t)) + 0.1 ‖Δ‖₂, of the located neurons. Target up, source down, and the size of
            the change: the paper's structure. Its weights and steps are in no public code, so they are FiNE's here
    fine    max_j − log p(y_j) + 10 max_j − log(1 − p(y_j after the new words)) + KL(before ‖ now) + 0.1 ‖Δ‖₂. The KL is
            the mean over all positions before the new words, the prompt's and the image's. Neurons: `located_by_fine`

The papers edit from one prompt. Here an edit has several images: losses are means over answers, and a step takes
answers in turn, at most ANSWERS at once. A neuron that FiNE locates for two tokens has one row, not two that add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from math import isfinite, log
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmray.errors import InputError
from mmray.features.editing.dataset import Example, batches
from mmray.features.editing.deltas import Deltas, Neuron
from mmray.features.editing.divergence import highest
from mmray.features.editing.resumed_forward import ResumedForward, resume
from mmray.features.editing.task import Task
from mmray.models.loading import LoadedModel
from mmray.models.norms import vocabulary_logits
from mmray.models.pixels import BUDGET, pixels_of, within_budget
from mmray.models.prompting import Batch
from mmray.neurons.activation_cache import cache_activations, forward
from mmray.neurons.scoring import score_captured
from mmray.neurons.token_positions import TokenPosition

LEARNING_RATE, STEPS = 5e-3, 50
"""FiNE's for LLaMA-2-7B."""
SURE = -log(0.9)
"""Of − log p: learning stops where it is less for every new token."""
SIZE_WEIGHT, PREFIX_WEIGHT, REPEAT_WEIGHT, SOURCE_WEIGHT = 0.1, 1.0, 10.0, 1.0
"""γ, α and β of FiNE; and of Pan et al., the weight of the old token."""
PER_TOKEN, LAST_LAYERS = 5, 3
"""Neurons that FiNE locates per new token, and the last layers that it leaves out."""
ANSWERS = 8
"""Per step."""


def pan(task: Task) -> Deltas:
    """Learn deltas of the located neurons with the loss of Pan et al. 2024."""
    deltas = Deltas(task.model, task.neurons)
    descend(
        deltas, [PanAnswers.of(task.model, part, deltas) for part in _parts(task.model, task.new)], task.settings.seed
    )
    return deltas


def fine(task: Task) -> Deltas:
    """Learn deltas of the neurons that FiNE locates, with its loss."""
    deltas = Deltas(task.model, located_by_fine(task.model, task.new))
    descend(
        deltas, [FineAnswers.of(task.model, part, deltas) for part in _parts(task.model, task.new)], task.settings.seed
    )
    return deltas


class Answers(Protocol):
    """Answers with a loss that is learned."""

    def loss(self, deltas: Deltas) -> tuple[Float[Tensor, ""], float]:
        """Return the loss, and the largest − log p of a new token."""
        ...


def descend(deltas: Deltas, parts: Sequence[Answers], seed: int) -> list[float]:
    """Change the deltas by Adam, a step per part in turn, until all new tokens are sure; return each step's loss."""
    parameters = [parameter for layer in deltas.parameters.values() for parameter in layer]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    worst = dict.fromkeys(order, float("inf"))
    losses: list[float] = []
    for number in cycle(order):
        optimizer.zero_grad()
        loss, worst[number] = parts[number].loss(deltas)
        if len(losses) == STEPS or max(worst.values()) < SURE or not isfinite(loss.item()):
            return losses
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    raise AssertionError("a cycle does not end")


@dataclass(frozen=True)
class PanAnswers:
    """Answers with the loss of Pan et al. 2024. Tensors have one entry per new token, or per answer."""

    resumed: ResumedForward
    places: Int[Tensor, " new"]
    """Index among the resumed positions of the one that predicts each new token."""
    tokens: Int[Tensor, " new"]
    starts: Int[Tensor, " answer"]
    """The same of each answer's first new token."""
    old: Int[Tensor, " answer"]
    """The token that the model says there."""

    @classmethod
    def of(cls, model: LoadedModel, examples: Sequence[Example], deltas: Deltas) -> PanAnswers:
        """Return these answers; all of them fit one batch."""
        (batch,) = batches(model, examples)
        first = 0
        places: list[int] = []
        starts: list[int] = []
        for example in examples:
            start, stop = _new_words(example)
            starts.append(first + start)
            places += range(first + start, first + stop)
            first += stop
        resumed = resume(model, batch, deltas)
        index = torch.tensor(places, device=resumed.targets.device)
        old = torch.tensor([example.rejected[1] for example in examples if example.rejected], device=index.device)
        return cls(resumed, index, resumed.targets[index], torch.tensor(starts, device=index.device), old)

    def loss(self, deltas: Deltas) -> tuple[Float[Tensor, ""], float]:
        """Return the loss, and the largest − log p of a new token."""
        log_probs = self.resumed.logits(deltas).log_softmax(1)
        new = -log_probs[self.places, self.tokens]
        old = log_probs[self.starts, self.old]
        loss = (new.sum() + SOURCE_WEIGHT * _unlikely(old).sum()) / len(self.old)
        return loss + SIZE_WEIGHT * _norm(deltas), new.max().item()


@dataclass(frozen=True)
class FineAnswers:
    """Answers with FiNE's loss."""

    before_new: ResumedForward
    """Positions of the prompt and the answer before those that predict a new token."""
    unchanged: Float[Tensor, "prefix hidden"]
    """The final norm's input there before the edit: log-probabilities of all answers would fill the memory."""
    new: ResumedForward
    """Those that predict a new token, and the last one of each answer, which follows them."""
    words: list[Int[Tensor, " token"]]
    """New tokens of each answer."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: LoadedModel, examples: Sequence[Example], deltas: Deltas) -> FineAnswers:
        """Return these answers; all of them fit one batch."""
        (batch,) = batches(model, examples)
        resumed = resume(model, batch, deltas)
        prefix, new = [], []
        for row, example in enumerate(examples):
            start, stop = _new_words(example)
            # The position before a token predicts it.
            first = batch.caption_start[row] + start - 1
            prefix += [batch.flat(row, position) for position in range(first)]
            new += [batch.flat(row, position) for position in range(first, batch.caption_start[row] + stop)]
        device = resumed.hidden.device
        before_new, after = (replace(resumed, positions=torch.tensor(one, device=device)) for one in (prefix, new))
        words = [torch.tensor(example.tokens[slice(*_new_words(example))], device=device) for example in examples]
        return cls(before_new, before_new.states(None), after, words)

    def loss(self, deltas: Deltas) -> tuple[Float[Tensor, ""], float]:
        """Return the loss, and the largest − log p of a new token."""
        # One forward for both kinds of positions.
        assert self.before_new.positions is not None
        assert self.new.positions is not None
        count = len(self.before_new.positions)
        every = replace(self.new, positions=torch.cat([self.before_new.positions, self.new.positions]))
        log_probs = every.logits(deltas).log_softmax(1)
        with torch.no_grad():
            before = vocabulary_logits(every.model, self.unchanged).log_softmax(1).to(log_probs.device)
        divergence = (before.exp() * (before - log_probs[:count])).sum() / max(count, 1)
        each = torch.split(log_probs[count:], [len(words) + 1 for words in self.words])
        largest = [-part[:-1].gather(1, words[:, None]).min() for part, words in zip(each, self.words, strict=True)]
        again = [_unlikely(part[-1][words]).max() for part, words in zip(each, self.words, strict=True)]
        new = torch.stack(largest)
        loss = new.mean() + PREFIX_WEIGHT * divergence + REPEAT_WEIGHT * torch.stack(again).mean()
        return loss + SIZE_WEIGHT * _norm(deltas), new.max().item()


@torch.no_grad()
def located_by_fine(model: LoadedModel, examples: Sequence[Example]) -> list[Neuron]:
    """Return the neurons that write what the model says where new tokens are due (FiNE's location).

    Teacher-forced along the new words, the model's likeliest token at each is o. A neuron's score there is its
    contribution to o. Per new token, the highest PER_TOKEN of all layers but the last LAST_LAYERS count, by the mean
    over the answers with the same new words.

    Raises InputError if the model has no other layers, or nothing new is said.
    """
    layers = range(len(model.widths) - LAST_LAYERS)
    if not layers:
        raise InputError(f"{model.name}: --method fine leaves out the last {LAST_LAYERS} layers, and it has no others")
    sums: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for part in _parts(model, examples):
        (batch,) = batches(model, part)
        for example, scores in zip(part, _said(model, batch, part), strict=True):
            sums[example.tokens[slice(*_new_words(example))]].append(scores)
    found: dict[Neuron, None] = {}
    starts = list(model.widths[: len(layers)])
    for several in sums.values():
        for scores in torch.stack(several).mean(dim=0):
            by_layer = dict(zip(layers, torch.split(scores, starts), strict=True))
            found |= dict.fromkeys(highest(by_layer, PER_TOKEN))
    return list(found)


def _said(model: LoadedModel, batch: Batch, examples: Sequence[Example]) -> Iterator[Float[Tensor, "new neuron"]]:
    """Yield every neuron's contribution to the likeliest token where each answer's new tokens are due."""
    lengths, positions = [], []
    for row, example in enumerate(examples):
        start, stop = _new_words(example)
        lengths.append(stop - start)
        first = batch.caption_start[row] - 1
        positions += [TokenPosition(row, first + at, 0, "", example.sample_id) for at in range(start, stop)]
    with cache_activations(model, batch, positions) as cache:
        forward(model, batch)
    said = vocabulary_logits(model, cache.hidden).argmax(dim=1).tolist()
    cache.positions = [replace(position, token=token) for position, token in zip(positions, said, strict=True)]
    scores = score_captured(model, cache, "contribution").scores[: len(model.widths) - LAST_LAYERS]
    yield from torch.split(torch.cat([part.cpu() for part in scores], dim=1), lengths)


def _parts(model: LoadedModel, examples: Sequence[Example]) -> list[list[Example]]:
    """Return the answers that say something new, up to the new words' end, at most ANSWERS at once.

    Raises InputError if there is none.
    """
    saying = [one for one in examples if one.rejected and (one.no_repeat_from or 0) > one.rejected[0]]
    if not saying:
        raise InputError("methods pan and fine write new words, and this edit has none; use another --method")
    # What follows is not learned; the recorded states would belong to all of it.
    cut = [replace(example, tokens=example.tokens[: example.no_repeat_from], cache=None) for example in saying]
    # Answers with and without an image can't share a batch.
    kinds = ([one for one in cut if (one.image is not None) == with_image] for with_image in (True, False))
    return [
        part for own in kinds for part in within_budget(own, lambda one: pixels_of(model, one.image), BUDGET, ANSWERS)
    ]


def _new_words(example: Example) -> tuple[int, int]:
    """Return where an answer's new words begin and end; it ends with them."""
    assert example.rejected
    return example.rejected[0], len(example.tokens)


def _unlikely(log_prob: Float[Tensor, " one"]) -> Float[Tensor, " one"]:
    """Return − log(1 − p)."""
    # Clamped: at probability 1 the logarithm and its gradient are infinite.
    return -torch.log1p(-log_prob.exp().clamp(max=1 - 1e-6))


def _norm(deltas: Deltas) -> Float[Tensor, ""]:
    """Return ‖Δ‖₂ of all rows together; its gradient at zero is zero."""
    rows = [deltas.rows(layer).flatten() for layer in deltas.units]
    norm: Tensor = torch.linalg.vector_norm(torch.cat([row.to(rows[0].device) for row in rows]))
    return norm
