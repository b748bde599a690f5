"""Learn deltas of W_out rows by gradient descent: say the new, no longer the old, and leave all else as it was.

The loss is over answers that should change (new) and answers that should stay (kept), of several kinds. New answers are
summed over their tokens and averaged (Pan et al. 2024, with the guards of FiNE, Pan et al. 2025):

      − log p(new answer)                     each of its tokens, sub-tokens and end included; if the article changes
                                              with the word, also with the new word after the old article
      − log (1 − p(old token))                where the new answer departs from the old one
      − log (1 − p(new words' first token))   after the new words: not again
    + keep_weight · Σ weight(kind) · KL(before ‖ now)    averaged over the kind's positions with the smallest lead,
                                                         and as many random ones
    + curvature_weight · ½ ‖M‖²                          the same at all kept positions, to second order: `whitening`
    + size_weight · Σ ‖Δ row‖² / mean ‖W_out row‖²       instead, where deltas are not whitened

At the first new word, − log p may be taken with its logit lowered by `TrainingConfig.margin`: a word that only just
leads on the training images is overtaken on others.

Probabilities are over `candidates` and the rest of the vocabulary, whose mass is taken as before the edit.

A kept answer is lost where another token overtakes the likeliest. So the positions with the smallest lead count most;
they are found again in every round. Within a round the loss is a function of the deltas alone, and L-BFGS descends it.
From zero it stays in the span of the gradients, so an edit is small where nothing asks for it. (Adam moves all numbers
alike, which undoes the whitening.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmray.features.editing.before_edit import BeforeEdit
from mmray.features.editing.candidates import CHUNK, Candidates, log_rest
from mmray.features.editing.dataset import Example
from mmray.features.editing.deltas import Deltas
from mmray.features.editing.resumed_forward import ResumedForward, batched, resume, resume_all
from mmray.models.loading import LoadedModel

ENOUGH_LEARNED = 0.95
"""Share of the new answers that ends learning; with few answers, this means all of them."""
Part = TypeVar("Part")
NEW_BATCHES = 2
"""In a round, if later blocks must run: a step over all new answers would take too long."""


@dataclass(frozen=True)
class TrainingConfig:
    """How to learn."""

    steps: int = 20
    """Of L-BFGS, per round."""
    keep_weight: float = 300.0
    curvature_weight: float = 100.0
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of a kind of kept answers; 1 by default."""
    size_weight: float = 5e-4
    margin: float = 0.0
    """Logits by which new words must lead on the training images."""
    positions: int = 128
    """Positions of each kind that a step uses, in an edit of the last layer."""
    rounds: int = 4
    """At most, and at least two."""
    seed: int = 0


@dataclass(frozen=True)
class _NewAnswers:
    """Answers that should change. Tensors have one entry per position; −1 where no token is rejected or banned."""

    resumed: ResumedForward
    candidates: Candidates
    targets: Int[Tensor, " position"]
    """Tokens, here and below, are numbers of candidates."""
    rejected: Int[Tensor, " position"]
    """The token that the model said here before."""
    banned: Int[Tensor, " position"]
    """The new words' first token, after the new words."""
    margin: Float[Tensor, " position"]
    """Logits by which the answer's token must lead."""
    learned: Bool[Tensor, " position"]
    """False for context, whose tokens are not learned."""

    @classmethod
    def of(
        cls, resumed: ResumedForward, examples: Sequence[Example], margin: float, candidates: Candidates
    ) -> _NewAnswers:
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
        return cls(
            resumed,
            candidates,
            candidates.numbers(resumed.targets),
            candidates.numbers(torch.tensor(rejected, device=device)),
            candidates.numbers(torch.tensor(banned, device=device)),
            torch.tensor(margins, device=device),
            torch.tensor(learned, device=device),
        )

    def loss(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return the loss of the answers, summed."""
        targets = self.targets[:, None]
        logits = self.candidates.logits(self.resumed.states(deltas))
        log_probs = logits.scatter_add(1, targets, -self.margin[:, None]).log_softmax(1)
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
        """Return, per answer, whether each of its tokens is the likeliest candidate."""
        part = self.resumed
        wrong = (self.candidates.logits(part.states(deltas)).argmax(dim=1) != self.targets) & self.learned
        return torch.zeros(_answers(part), device=wrong.device).index_add(0, part.rows, wrong.float()) == 0


@dataclass
class KeptPositions:
    """The positions of answers of one kind that should stay."""

    resumed: ResumedForward
    candidates: Candidates
    weight: float
    likeliest: Int[Tensor, " position"]
    rest: Float[Tensor, " position"]
    """log Σ exp(logit) over the tokens that are no candidates, before the edit."""
    near: ResumedForward
    """The positions that count."""
    near_rest: Float[Tensor, " near"]
    before: Float[Tensor, "near entry"]
    """Log-probabilities there before the edit: of the candidates, and of all other tokens together."""

    @classmethod
    @torch.no_grad()
    def of(
        cls, resumed: ResumedForward, candidates: Candidates, total: Float[Tensor, " position"], weight: float
    ) -> KeptPositions:
        """Return the answers; `total` is log Σ exp(logit) over the vocabulary. All positions count until `refresh`."""
        likeliest, rest = [], []
        for states, whole in zip(torch.split(resumed.states(None), CHUNK), torch.split(total, CHUNK), strict=True):
            logits = candidates.logits(states)
            likeliest.append(logits.argmax(dim=1))
            rest.append(log_rest(whole, logits))
        kept = cls(resumed, candidates, weight, torch.cat(likeliest), torch.cat(rest), resumed, total, total[:, None])
        if resumed.later_blocks:
            kept._look_at(resumed, kept.rest)
        return kept

    @torch.no_grad()
    def refresh(self, deltas: Deltas, most: int, generator: torch.Generator) -> None:
        """Find the positions where the likeliest token's lead is now smallest, and draw as many others."""
        if self.resumed.later_blocks:
            # Attention needs whole sequences, so all positions count.
            return
        leads = []
        for states, first in zip(
            torch.split(self.resumed.states(deltas), CHUNK), torch.split(self.likeliest, CHUNK), strict=True
        ):
            now = self.candidates.logits(states)
            others = now.scatter(1, first[:, None], -torch.inf).amax(dim=1)
            leads.append(now.gather(1, first[:, None])[:, 0] - others)
        order = torch.cat(leads).argsort()
        drawn = torch.randperm(len(order), generator=generator)[: most // 2].to(order.device)
        chosen = torch.cat([order[: most - len(drawn)], drawn])
        self._look_at(self.resumed.at(chosen), self.rest[chosen])

    def _look_at(self, near: ResumedForward, rest: Float[Tensor, " near"]) -> None:
        self.near, self.near_rest = near, rest
        self.before = self._log_probs(near.states(None))

    def _log_probs(self, states: Float[Tensor, "near hidden"]) -> Float[Tensor, "near entry"]:
        return torch.cat([self.candidates.logits(states), self.near_rest[:, None]], dim=1).log_softmax(1)

    def divergence(self, deltas: Deltas) -> Float[Tensor, ""]:
        """Return the mean KL(before ‖ now) over the positions that count, weighted."""
        now = self._log_probs(self.near.states(deltas))
        return self.weight * (self.before.exp() * (self.before - now)).sum() / len(now)


def learn(
    model: LoadedModel,
    deltas: Deltas,
    new: Sequence[Example],
    keep: Mapping[str, Sequence[Example]],
    config: TrainingConfig,
    before: BeforeEdit | None = None,
) -> list[float]:
    """Change the deltas so that the model gives the new answers and keeps the others; return the loss of each step.

    `before` is what tries with the same answers share.
    """
    changing, *stay = (
        [(part.shaped_by(deltas), rows) for part, rows in resume_all(model, examples, deltas)]
        for examples in (new, *keep.values())
    )
    staying = dict(zip(keep, stay, strict=True))
    said = {token for example in new for token in (*example.tokens, *(example.rejected or ())[1:])}
    parts = [*chain(*staying.values()), *changing]
    chosen, totals = (before or BeforeEdit()).candidates(model, staying, parts, said)
    news = [_NewAnswers.of(part, rows, config.margin, chosen) for part, rows in changing]
    each = iter(totals)
    kept = [
        [KeptPositions.of(part, chosen, next(each), config.weights.get(kind, 1.0)) for part, _ in staying[kind]]
        for kind in staying
        if staying[kind]
    ]
    generator = torch.Generator().manual_seed(config.seed)
    losses: list[float] = []
    for number in range(config.rounds):
        losses += _run_round(deltas, news, kept, config, generator)
        learned = torch.cat([answers.are_learned(deltas) for answers in news]).float().mean()
        # Kept positions that the first round overtook count from the second on.
        if number > 0 and learned >= ENOUGH_LEARNED:
            break
    return losses


def _run_round(
    deltas: Deltas,
    changing: Sequence[_NewAnswers],
    staying: Sequence[Sequence[KeptPositions]],
    config: TrainingConfig,
    generator: torch.Generator,
) -> list[float]:
    """Run one round of steps; return the loss of each evaluation."""
    # All of them, and all kept answers of a kind, are one part unless later blocks must run.
    some = _drawn(changing, NEW_BATCHES, generator)
    others = [part for kind in staying for part in _drawn(kind, 1, generator)]
    for part in others:
        part.refresh(deltas, config.positions, generator)
    # Per answer, so that the weights of the terms don't depend on how many a batch holds.
    answers = sum(_answers(part.resumed) for part in some)
    parameters = [parameter for layer in deltas.parameters.values() for parameter in layer]
    optimizer = torch.optim.LBFGS(parameters, max_iter=config.steps, history_size=10, line_search_fn="strong_wolfe")
    losses: list[float] = []

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = sum((part.loss(deltas) for part in some), torch.zeros(())) / answers
        loss = loss + config.keep_weight * sum(part.divergence(deltas) for part in others)
        loss = loss + (config.curvature_weight if deltas.whitened else config.size_weight) * deltas.size()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        return loss

    optimizer.step(evaluate)  # type: ignore[no-untyped-call]
    return losses


def _drawn(parts: Sequence[Part], most: int, generator: torch.Generator) -> list[Part]:
    return [parts[number] for number in torch.randperm(len(parts), generator=generator)[:most].tolist()]


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
