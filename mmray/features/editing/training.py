"""Learn deltas of W_out rows by gradient descent: say the new, no longer the old, and leave all else as it was.

The loss, over answers that are to change (new) and answers that are to stay (kept), each summed over an answer's tokens
and averaged over answers (Pan et al. 2024 with the guards of FiNE, Pan et al. 2025):

      − log p(new answer)                     every token of it, sub-tokens and end included; where another article
                                              would stand before the new word, behind the old one, too
      − log (1 − p(old token))                where the new answer leaves the old one
      − log (1 − p(new words' first token))   behind the new words: not again
    + keep · KL(before ‖ now)                 at the kept answers' tokens that come nearest to another answer
    + off_target_weight · mean ‖what the edit adds‖² / mean ‖W_out row‖²      at every token of the kept answers
    + size · Σ ‖Δ row‖² / mean ‖W_out row‖²

Where new words begin, − log p may be that with their first token's logit lowered (`TrainingConfig.margin`): a word that
only just leads on the images learnt from is overtaken on others.

Where new answers have not been taken in by then, that is some token of them is not the likeliest, learning goes on for
another config at half the rate, and a third.

An answer that is to stay is lost where another token overtakes the likeliest. So the places that count are those where
the lead is smallest now; they are found anew every few steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import ResumedForward, batched, resume, resume_all
from mmray.models.loading import LoadedModel

PIECE = 1024
"""Places whose logits are held at once where all are gone through: a row of them is as long as the vocabulary."""
TAKEN_IN = 0.95
"""Part of the new answers that have to be taken in before learning ends: of few of them, all."""
BATCHES = 2
"""Batches of each kind a step, where the later blocks have to be run again."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to learn."""

    steps: int = 60
    rate: float = 0.25
    """Adam's first step, in units of the root mean square of a layer's W_out; it falls to a tenth of that."""
    keep: float = 10.0
    off_target_weight: float = 0.0015
    size: float = 5e-4
    margin: float = 0.0
    """Logits by which new words are to lead on the images that they are learnt on."""
    places: int = 1000
    """Of an edit of the last layer, the places of the kept answers that a step looks at."""
    refresh_every: int = 5
    """Steps until they are found again."""
    courses: int = 3
    """At most, while some new answer is not taken in."""
    seed: int = 0


@dataclass(frozen=True)
class _New:
    """Answers that are to change: −1 where a place avoids, or must not repeat, no token.

    `margin` is what a place's token is to lead by, in logits; of places that are not `learnt` the token does not count.
    """

    resumed: ResumedForward
    avoided: Int[Tensor, " place"]
    repeated: Int[Tensor, " place"]
    margin: Float[Tensor, " place"]
    learnt: Bool[Tensor, " place"]


@dataclass
class _Kept:
    """Answers that are to stay.

    `moment` is the mean of a aᵀ over their places, a the activations of the first edited layer's neurons. `near` are
    the places that count, and `before` what was said there.
    """

    resumed: ResumedForward
    likeliest: Int[Tensor, " place"]
    moment: Float[Tensor, "unit unit"]
    answers: int
    near: ResumedForward
    before: Float[Tensor, "near vocabulary"]

    @classmethod
    @torch.no_grad()
    def of(cls, part: ResumedForward) -> _Kept:
        """Return what is to stay of these answers; until `look`, what counts is the first places."""
        activation = part.activation.flatten(0, -2)
        moment = activation.T @ activation / len(activation)
        near = part if part.later else next(_pieces(part))
        likeliest = torch.cat([piece.logits().argmax(dim=1) for piece in _pieces(part)])
        return cls(part, likeliest, moment, _answers(part), near, near.logits().log_softmax(1))

    @torch.no_grad()
    def look(self, deltas: Deltas, most: int) -> None:
        """Find the places where the answers of before have the smallest lead now; of batches with later blocks, all."""
        if self.resumed.later:
            return
        leads = []
        for piece, first in zip(_pieces(self.resumed), torch.split(self.likeliest, PIECE), strict=True):
            now = piece.logits(deltas)
            others = now.scatter(1, first[:, None], -torch.inf).amax(dim=1)
            leads.append(now.gather(1, first[:, None])[:, 0] - others)
        lead = torch.cat(leads)
        self.near = self.resumed.at(lead.topk(min(most, len(lead)), largest=False).indices)
        self.before = self.near.logits().log_softmax(1)

    def change(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return the divergence of what is said now from what was said before, summed over the places that count."""
        return (self.before.exp() * (self.before - self.near.logits(deltas).log_softmax(1))).sum()

    def stir(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return the mean ‖what the edit adds‖² over mean ‖W_out row‖², of the first edited layer."""
        rows = deltas.rows(deltas.first)
        return (rows * (self.moment @ rows)).sum() / (deltas.scales[deltas.first] ** 2 * rows.shape[1])


def learn(
    model: LoadedModel, deltas: Deltas, new: Sequence[Example], keep: Sequence[Example], config: TrainingConfig
) -> list[float]:
    """Change the deltas so that the model gives the new answers and keeps the others; return the loss of each step."""
    changing = [_New(part, *_bans(part, rows, config.margin)) for part, rows in resume_all(model, new, deltas)]
    staying = [_Kept.of(part) for part, _ in resume_all(model, keep, deltas)]
    draw = random.Random(config.seed)
    course_of_loss: list[float] = []
    for number in range(config.courses):
        course_of_loss += _run(deltas, changing, staying, replace(config, rate=config.rate / 2**number), draw)
        if torch.cat([_taken_in(part, deltas) for part in changing]).float().mean() >= TAKEN_IN:
            break
    return course_of_loss


def _run(
    deltas: Deltas, changing: Sequence[_New], staying: Sequence[_Kept], config: TrainingConfig, draw: random.Random
) -> list[float]:
    """Go through one config of steps, at a falling rate; return the loss of each."""
    groups = [{"params": learnt, "lr": config.rate * deltas.step(layer)} for layer, learnt in deltas.learnt.items()]
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, config.steps)
    losses = []
    for step in range(config.steps):
        optimizer.zero_grad()
        some = draw.sample(changing, min(BATCHES, len(changing)))
        loss = sum(_say(part, deltas) for part in some) / sum(_answers(part.resumed) for part in some)
        loss = loss + config.size * _size(deltas)
        others = draw.sample(staying, min(BATCHES, len(staying)))
        for part in others:
            if step % config.refresh_every == 0:
                part.look(deltas, config.places)
            loss = loss + config.keep * part.change(deltas) / sum(one.answers for one in others)
            loss = loss + config.off_target_weight * part.stir(deltas) / len(others)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        falling.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _taken_in(new: _New, deltas: Deltas) -> Bool[Tensor, " answer"]:
    """Tell of each answer that is to change whether every token of it is the likeliest."""
    part = new.resumed
    wrong = (part.logits(deltas).argmax(dim=1) != part.targets) & new.learnt
    return torch.zeros(_answers(part), device=wrong.device).index_add(0, part.rows, wrong.float()) == 0


def _size(deltas: Deltas) -> Float[Tensor, ""]:
    """Return Σ ‖Δ row‖² over the mean ‖W_out row‖² of its layer."""
    parts = [
        rows.square().sum() / (deltas.scales[layer] ** 2 * rows.shape[1])
        for layer in deltas.units
        for rows in (deltas.rows(layer),)
    ]
    # Layers may lie on several devices.
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _say(new: _New, deltas: Deltas) -> Float[Tensor, ""]:
    """Return the loss of the answers that are to change, summed."""
    targets = new.resumed.targets[:, None]
    log_probs = new.resumed.logits(deltas).scatter_add(1, targets, -new.margin[:, None]).log_softmax(1)
    loss = -log_probs.gather(1, targets)[new.learnt].sum()
    for tokens in (new.avoided, new.repeated):
        places = (tokens >= 0).nonzero()[:, 0]
        said = log_probs[places, tokens[places]].exp()
        loss = loss - torch.log1p(-said.clamp(max=1 - 1e-6)).sum()
    return loss


def _answers(part: ResumedForward) -> int:
    return int(part.rows.max()) + 1


def _bans(part: ResumedForward, examples: Sequence[Example], lead: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, place by place, the token to avoid, the one not to come again, what the answer's is to lead by, and
    whether it is learnt.
    """
    avoided, repeated, leads, learnt = [], [], [], []
    for example in examples:
        first = example.avoided[0] if example.avoided else None
        for place, token in enumerate(example.tokens):
            avoided.append(example.avoided[1] if example.avoided and place == first else -1)
            again = example.said is not None and first is not None and place >= example.said
            word = example.tokens[first] if again and first is not None else -1
            repeated.append(word if word != token else -1)
            leads.append(lead if example.said is not None and place == first else 0.0)
            learnt.append(place >= example.learnt)
    device = part.targets.device
    return (
        torch.tensor(avoided, device=device),
        torch.tensor(repeated, device=device),
        torch.tensor(leads, device=device),
        torch.tensor(learnt, device=device),
    )


@torch.no_grad()
def log_likelihoods(model: LoadedModel, examples: Sequence[Example]) -> list[float]:
    """Return the log-probability of each answer, end included, in nats."""
    found: dict[int, float] = {}
    nothing = Deltas(model, [(len(model.widths) - 1, 0)])
    for batch, rows in batched(model, examples):
        part = resume(model, batch, nothing)
        said = part.logits().log_softmax(1).gather(1, part.targets[:, None])[:, 0]
        sums = torch.zeros(len(rows), device=said.device).index_add(0, part.rows, said)
        found |= zip(map(id, rows), sums.tolist(), strict=True)
    return [found[id(example)] for example in examples]


def _pieces(part: ResumedForward) -> Iterator[ResumedForward]:
    """Yield the places of a resumed forward some at a time; one with later blocks in one piece."""
    if part.later:
        yield part
    else:
        every = torch.arange(len(part.targets), device=part.targets.device)
        yield from (part.at(every[start : start + PIECE]) for start in range(0, len(every), PIECE))
