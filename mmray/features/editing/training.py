"""Learn deltas of W_out rows by gradient descent: say the new, no longer the old, and leave all else as it was.

The loss is over answers that should change (new) and answers that should stay (kept). Each is summed over an answer's
tokens and averaged over answers (Pan et al. 2024, with the guards of FiNE, Pan et al. 2025):

      − log p(new answer)                     each of its tokens, sub-tokens and end included; if the article changes
                                              with the word, also with the new word after the old article
      − log (1 − p(old token))                where the new answer departs from the old one
      − log (1 − p(new words' first token))   after the new words: not again
    + keep_weight · KL(before ‖ now)          at the kept answers' positions with the smallest lead
    + off_target_weight · mean ‖change of the MLP output‖² / mean ‖W_out row‖²     at every token of the kept answers
    + size_weight · Σ ‖Δ row‖² / mean ‖W_out row‖²

At the first new word, − log p may be taken with its logit lowered by `TrainingConfig.margin`: a word that only just
leads on the training images is overtaken on others.

A new answer is learned when each of its tokens is the likeliest. If too few are after one round, another follows at
half the learning rate, and a third.

A kept answer is lost where another token overtakes the likeliest. So the positions that count are those with the
smallest lead; they are found again every few steps.
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

CHUNK = 1024
"""Positions whose logits are held at once: each row of them is as long as the vocabulary."""
ENOUGH_LEARNED = 0.95
"""Share of the new answers that ends learning; with few answers, this means all of them."""
BATCHES_PER_STEP = 2
"""Of new and of kept answers each, if later blocks must run: a step over all of them would take too long."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to learn."""

    steps: int = 60
    """Per round."""
    learning_rate: float = 0.25
    """Of Adam, in units of the standard deviation of a layer's W_out. It falls to a tenth within a round."""
    keep_weight: float = 10.0
    off_target_weight: float = 0.0015
    size_weight: float = 5e-4
    margin: float = 0.0
    """Logits by which new words must lead on the training images."""
    positions: int = 1000
    """Positions of the kept answers that a step of an edit of the last layer uses."""
    refresh_every: int = 5
    """Steps after which these positions are found again."""
    rounds: int = 3
    """At most."""
    seed: int = 0


@dataclass(frozen=True)
class _NewAnswers:
    """Answers that should change. Tensors have one entry per position; −1 where no token is rejected or banned."""

    resumed: ResumedForward
    rejected: Int[Tensor, " position"]
    """The token that the model said here before."""
    banned: Int[Tensor, " position"]
    """The new words' first token, after the new words."""
    margin: Float[Tensor, " position"]
    """Logits by which the answer's token must lead."""
    learned: Bool[Tensor, " position"]
    """False for context, whose tokens are not learned."""

    @classmethod
    def of(cls, resumed: ResumedForward, examples: Sequence[Example], margin: float) -> _NewAnswers:
        """Return the answers of these examples, whose positions `resumed` has in the same order."""
        rejected, banned, margins, learned = [], [], [], []
        for example in examples:
            start = example.rejected[0] if example.rejected else None
            for position, token in enumerate(example.tokens):
                rejected.append(example.rejected[1] if example.rejected and position == start else -1)
                after = example.no_repeat_from is not None and start is not None and position >= example.no_repeat_from
                word = example.tokens[start] if after and start is not None else -1
                # Where the answer itself has the token again, it can't be banned.
                banned.append(word if word != token else -1)
                margins.append(margin if example.no_repeat_from is not None and position == start else 0.0)
                learned.append(position >= example.loss_from)
        device = resumed.targets.device
        columns = (torch.tensor(column, device=device) for column in (rejected, banned, margins, learned))
        return cls(resumed, *columns)

    def loss(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return the loss of the answers, summed."""
        targets = self.resumed.targets[:, None]
        log_probs = self.resumed.logits(deltas).scatter_add(1, targets, -self.margin[:, None]).log_softmax(1)
        loss = -log_probs.gather(1, targets)[self.learned].sum()
        for tokens in (self.rejected, self.banned):
            positions = (tokens >= 0).nonzero()[:, 0]
            probability = log_probs[positions, tokens[positions]].exp()
            # Clamped: at probability 1 the logarithm and its gradient are infinite.
            # log1p, because 1 − p rounds to 1 for small p.
            loss = loss - torch.log1p(-probability.clamp(max=1 - 1e-6)).sum()
        return loss

    @torch.no_grad()
    def are_learned(self, deltas: Deltas) -> Bool[Tensor, " answer"]:
        """Return, per answer, whether each of its tokens is the likeliest."""
        part = self.resumed
        wrong = (part.logits(deltas).argmax(dim=1) != part.targets) & self.learned
        return torch.zeros(_answers(part), device=wrong.device).index_add(0, part.rows, wrong.float()) == 0


@dataclass
class _KeptAnswers:
    """Answers that should stay."""

    resumed: ResumedForward
    likeliest: Int[Tensor, " position"]
    moment: Float[Tensor, "unit unit"]
    """Mean of a aᵀ over the positions; a are the activations of the edited neurons of the first edited layer."""
    answers: int
    near: ResumedForward
    """The positions that count."""
    before: Float[Tensor, "near vocabulary"]
    """Log-probabilities there before the edit."""

    @classmethod
    @torch.no_grad()
    def of(cls, resumed: ResumedForward) -> _KeptAnswers:
        """Return the answers; until `refresh`, the first positions count."""
        activation = resumed.activation.flatten(0, -2)
        moment = activation.T @ activation / len(activation)
        near = resumed if resumed.later_blocks else next(_chunks(resumed))
        likeliest = torch.cat([chunk.logits().argmax(dim=1) for chunk in _chunks(resumed)])
        return cls(resumed, likeliest, moment, _answers(resumed), near, near.logits().log_softmax(1))

    @torch.no_grad()
    def refresh(self, deltas: Deltas, most: int) -> None:
        """Find the positions where the likeliest token's lead is now smallest; with later blocks, keep all."""
        if self.resumed.later_blocks:
            return
        leads = []
        for chunk, first in zip(_chunks(self.resumed), torch.split(self.likeliest, CHUNK), strict=True):
            now = chunk.logits(deltas)
            others = now.scatter(1, first[:, None], -torch.inf).amax(dim=1)
            leads.append(now.gather(1, first[:, None])[:, 0] - others)
        lead = torch.cat(leads)
        self.near = self.resumed.at(lead.topk(min(most, len(lead)), largest=False).indices)
        # Computed again: for all positions, log-probabilities over the vocabulary would not fit in memory.
        self.before = self.near.logits().log_softmax(1)

    def divergence(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return KL(before ‖ now), summed over the positions that count."""
        return (self.before.exp() * (self.before - self.near.logits(deltas).log_softmax(1))).sum()

    def off_target(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return the mean ‖change of the MLP output‖² over mean ‖W_out row‖², of the first edited layer."""
        # Σ ‖Δᵀ a‖² over positions is tr(Δᵀ (Σ a aᵀ) Δ), so a step needs the second moment only.
        rows = deltas.rows(deltas.first)
        return (rows * (self.moment @ rows)).sum() / (deltas.scales[deltas.first] ** 2 * rows.shape[1])


def learn(
    model: LoadedModel, deltas: Deltas, new: Sequence[Example], keep: Sequence[Example], config: TrainingConfig
) -> list[float]:
    """Change the deltas so that the model gives the new answers and keeps the others; return the loss of each step."""
    changing = [_NewAnswers.of(part, rows, config.margin) for part, rows in resume_all(model, new, deltas)]
    staying = [_KeptAnswers.of(part) for part, _ in resume_all(model, keep, deltas)]
    rng = random.Random(config.seed)
    losses: list[float] = []
    for number in range(config.rounds):
        # A smaller step finds what the larger one overshot.
        halved = replace(config, learning_rate=config.learning_rate / 2**number)
        losses += _run_round(deltas, changing, staying, halved, rng)
        if torch.cat([answers.are_learned(deltas) for answers in changing]).float().mean() >= ENOUGH_LEARNED:
            break
    return losses


def _run_round(
    deltas: Deltas,
    changing: Sequence[_NewAnswers],
    staying: Sequence[_KeptAnswers],
    config: TrainingConfig,
    rng: random.Random,
) -> list[float]:
    """Run one round of steps at a falling learning rate; return the loss of each step."""
    # Adam moves each number by about the learning rate, so the rate is in units of the weights.
    groups = [
        {"params": parameters, "lr": config.learning_rate * deltas.step_size(layer)}
        for layer, parameters in deltas.parameters.items()
    ]
    # New in each round: the moments of a round's larger steps would carry over into the next.
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, config.steps)
    losses = []
    for step in range(config.steps):
        optimizer.zero_grad()
        some = rng.sample(changing, min(BATCHES_PER_STEP, len(changing)))
        # Per answer, so that the weights of the terms don't depend on how many a batch holds.
        loss = sum(part.loss(deltas) for part in some) / sum(_answers(part.resumed) for part in some)
        loss = loss + config.size_weight * _size(deltas)
        others = rng.sample(staying, min(BATCHES_PER_STEP, len(staying)))
        for part in others:
            if step % config.refresh_every == 0:
                part.refresh(deltas, config.positions)
            loss = loss + config.keep_weight * part.divergence(deltas) / sum(other.answers for other in others)
            loss = loss + config.off_target_weight * part.off_target(deltas) / len(others)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def _size(deltas: Deltas) -> Float[Tensor, ""]:
    """Return Σ ‖Δ row‖² over the mean ‖W_out row‖² of its layer."""
    parts = [
        rows.square().sum() / (deltas.scales[layer] ** 2 * rows.shape[1])
        for layer in deltas.units
        for rows in (deltas.rows(layer),)
    ]
    # Layers may be on several devices.
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _answers(part: ResumedForward) -> int:
    return int(part.rows.max()) + 1


@torch.no_grad()
def log_likelihoods(model: LoadedModel, examples: Sequence[Example]) -> list[float]:
    """Return the log-probability of each answer, end included, in nats."""
    found: dict[int, float] = {}
    # An edit of one neuron of the last layer, so that the resumed forward has no later blocks.
    unchanged = Deltas(model, [(len(model.widths) - 1, 0)])
    for batch, rows in batched(model, examples):
        part = resume(model, batch, unchanged)
        log_probs = part.logits().log_softmax(1).gather(1, part.targets[:, None])[:, 0]
        sums = torch.zeros(len(rows), device=log_probs.device).index_add(0, part.rows, log_probs)
        # By identity: batches are sorted by length, and equal examples may occur twice.
        found |= zip(map(id, rows), sums.tolist(), strict=True)
    return [found[id(example)] for example in examples]


def _chunks(part: ResumedForward) -> Iterator[ResumedForward]:
    """Yield the positions of a resumed forward in chunks; all at once if later blocks need whole sequences."""
    if part.later_blocks:
        yield part
    else:
        every = torch.arange(len(part.targets), device=part.targets.device)
        yield from (part.at(every[start : start + CHUNK]) for start in range(0, len(every), CHUNK))
