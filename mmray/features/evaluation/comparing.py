"""The same asks before and after an edit: greedy replies, and distributions along the reply before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.last_layer import LastLayer
from mmray.features.evaluation.queries import Change, Edit, Query, Reply, States, chunks
from mmray.models.norms import vocabulary_logits

LEAST = -100.0
"""Log-probability in nats below which a divergence does not follow."""
LOGITS_AT_ONCE = 2**27
"""Logits before the edit that are held while the edit is applied once."""


@torch.inference_mode()
def compare(questioner: DraftVerifier, edit: Edit, asks: Sequence[Query], replies: Sequence[Reply]) -> list[Change]:
    """Return the change of each ask, whose replies before the edit are given.

    The edit is applied once for as many asks as the logits before it fit in memory.
    """
    model = questioner.model
    changes: list[Change] = []
    for part in chunks([len(reply.hidden) * questioner.vocabulary for reply in replies], LOGITS_AT_ONCE):
        asked, before = asks[part], replies[part]
        places = torch.cat([reply.hidden for reply in before])
        # Those before are computed outside the block: what is applied may change the unembedding too.
        logits = torch.cat([vocabulary_logits(model, rows) for rows in torch.split(places, questioner.rows_at_once)])
        last = LastLayer.of(questioner, edit)
        with edit.applied(model):
            states = _states_after(questioner, last, asked, before)
            after = _replies_after(questioner, asked, before, states)
            same, divergence = _distances(questioner, logits, torch.cat([state.hidden for state in states]))
        counts = [len(reply.hidden) for reply in before]
        rows = zip(before, after, states, torch.split(same, counts), torch.split(divergence, counts), strict=True)
        changes.extend(_change(*row) for row in rows)
    return changes


def _states_after(
    questioner: DraftVerifier, last: LastLayer | None, asks: Sequence[Query], before: Sequence[Reply]
) -> list[States]:
    """Return the states along the replies before the edit: of an edit of the last layer alone without a forward."""
    tokens = [reply.tokens for reply in before]
    known = [last.after(reply.states, ask.whole) if last else None for ask, reply in zip(asks, before, strict=True)]
    first = next((number for number, states in enumerate(known) if states is not None), None)
    if last is None or first is None:
        return questioner.along(asks, tokens)
    (proof,) = questioner.along(asks[first : first + 1], tokens[first : first + 1])
    if not last.agrees(known[first], proof):
        return questioner.along(asks, tokens)
    open_ = [number for number, states in enumerate(known) if states is None]
    run = questioner.along([asks[number] for number in open_], [tokens[number] for number in open_])
    found = dict(zip(open_, run, strict=True))
    return [states if states is not None else found[number] for number, states in enumerate(known)]


@torch.inference_mode()
def forced(
    questioner: DraftVerifier, edit: Edit, asks: Sequence[Query], replies: Sequence[list[int]]
) -> list[tuple[list[int], list[int]]]:
    """Return the likeliest tokens along these replies, their ends included, before and after the edit."""
    if not asks:
        return []
    before = questioner.likeliest([state.hidden for state in questioner.along(asks, replies)])
    with edit.applied(questioner.model):
        after = questioner.likeliest([state.hidden for state in questioner.along(asks, replies)])
    return list(zip(before, after, strict=True))


@torch.inference_mode()
def whole_ranks(
    questioner: DraftVerifier, edit: Edit, asks: Sequence[Query], replies: Sequence[list[int]]
) -> list[tuple[float | None, float | None]]:
    """Return `ranks` and `firsts` of a `Change` along these replies instead of the model's own."""
    before = questioner.along(asks, replies)
    with edit.applied(questioner.model):
        after = questioner.along(asks, replies)
    return [_ranks(one.top, other.top) for one, other in zip(before, after, strict=True)]


def _ranks(before: Tensor | None, after: Tensor | None) -> tuple[float | None, float | None]:
    if before is None or after is None:
        return None, None
    same = (before == after).float()
    return float(same.mean()), float(same[:, 0].mean())


def _replies_after(
    questioner: DraftVerifier, asks: Sequence[Query], before: Sequence[Reply], states: Sequence[States]
) -> list[tuple[list[int], str]]:
    """Return tokens and texts after the edit: generated where the likeliest tokens along the reply are others now.

    Where they were others before the edit already, in a near tie, the forward proves nothing.
    """
    steady = [number for number, reply in enumerate(before) if reply.steady]
    found: dict[int, tuple[list[int], str]] = {}
    replies = questioner.replies(
        [asks[n] for n in steady], [[before[n].tokens] for n in steady], [states[n] for n in steady]
    )
    for number, reply in zip(steady, replies, strict=True):
        found[number] = reply.tokens, reply.text
    others = [number for number in range(len(asks)) if number not in found]
    for number, tokens in zip(others, questioner.write_alone([asks[n] for n in others]), strict=True):
        found[number] = tokens, questioner.text(tokens)
    return [found[number] for number in range(len(asks))]


def _distances(
    questioner: DraftVerifier, before: Float[Tensor, "place vocabulary"], hidden: Float[Tensor, "place hidden"]
) -> tuple[Tensor, Tensor]:
    """Return at each place whether the likeliest token is the same, and KL(before ‖ after) in nats."""
    same, divergence, size = [], [], questioner.rows_at_once
    for old, rows in zip(torch.split(before, size), torch.split(hidden, size), strict=True):
        new = vocabulary_logits(questioner.model, rows)
        same.append(old.argmax(dim=1) == new.argmax(dim=1))
        first, second = old.double().log_softmax(dim=1), new.double().log_softmax(dim=1)
        # A token that is banned has no probability left, and would make every divergence infinite.
        second = second.clamp(min=LEAST)
        divergence.append((first.exp() * (first - second)).nansum(dim=1).clamp(min=0))
    return torch.cat(same).cpu(), torch.cat(divergence).cpu()


def _change(before: Reply, after: tuple[list[int], str], states: States, same: Tensor, divergence: Tensor) -> Change:
    tokens, text = after
    places = max(len(before.tokens), len(tokens)) + 1
    equal = sum(old == new for old, new in zip(before.tokens, tokens, strict=False))
    ranks, firsts = _ranks(before.states.top, states.top)
    return Change(
        before=before.text,
        after=text,
        span=float(same.float().mean()),
        greedy_span=(equal + (len(before.tokens) == len(tokens))) / places,
        divergence=float(divergence.mean()),
        ranks=ranks,
        firsts=firsts,
    )
