"""The same queries before and after an edit: greedy replies, and distributions along the reply before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mmray.features.evaluation.draft_verifier import DraftVerifier
from mmray.features.evaluation.last_layer import LastLayer
from mmray.features.evaluation.queries import Change, Edit, Query, Reply, States, queries_after
from mmray.models.norms import vocabulary_logits
from mmray.models.pixels import within_budget

LOWEST_LOG_PROB = -100.0
"""In nats. A banned token has probability 0, which would make every divergence infinite."""
# 512 MB in fp32.
LOGITS_AT_ONCE = 2**27
"""Logits before the edit that are held while the edit is applied once."""


@torch.inference_mode()
def compare(verifier: DraftVerifier, edit: Edit, queries: Sequence[Query], replies: Sequence[Reply]) -> list[Change]:
    """Return how each query's reply changes; `replies` are those before the edit.

    The edit is applied once per group of queries whose logits before it fit in memory.
    """
    model = verifier.model
    changes: list[Change] = []
    pairs = zip(queries, replies, strict=True)
    for part in within_budget(pairs, lambda pair: len(pair[1].hidden) * verifier.vocabulary, LOGITS_AT_ONCE):
        some, before = [query for query, _ in part], [reply for _, reply in part]
        hidden = torch.cat([reply.hidden for reply in before])
        # Outside the block, because an edit may change the unembedding too.
        logits = torch.cat([vocabulary_logits(model, rows) for rows in torch.split(hidden, verifier.rows_at_once)])
        last = LastLayer.of(verifier, edit)
        some = queries_after(edit, some)
        with edit.applied(model):
            states = _states_after(verifier, last, some, before)
            after = _replies_after(verifier, some, before, states)
            same, kl = _distances(verifier, logits, torch.cat([state.hidden for state in states]))
        counts = [len(reply.hidden) for reply in before]
        rows = zip(before, after, states, torch.split(same, counts), torch.split(kl, counts), strict=True)
        changes.extend(_change(*row) for row in rows)
    return changes


def _states_after(
    verifier: DraftVerifier, last: LastLayer | None, queries: Sequence[Query], before: Sequence[Reply]
) -> list[States]:
    """Return the states along the replies before the edit; for an edit of the last layer alone, without a forward."""
    tokens = [reply.tokens for reply in before]
    computed = [
        last.after(reply.states, query.all_positions) if last else None
        for query, reply in zip(queries, before, strict=True)
    ]
    first = next(((number, states) for number, states in enumerate(computed) if states is not None), None)
    if last is None or first is None:
        return verifier.states_along(queries, tokens)
    # One forward checks that the shortcut holds for this model; if not, all queries get one.
    number, states = first
    (forward,) = verifier.states_along([queries[number]], [tokens[number]])
    if not last.agrees(states, forward):
        return verifier.states_along(queries, tokens)
    missing = [number for number, states in enumerate(computed) if states is None]
    run = verifier.states_along([queries[number] for number in missing], [tokens[number] for number in missing])
    found = dict(zip(missing, run, strict=True))
    return [states if states is not None else found[number] for number, states in enumerate(computed)]


@torch.inference_mode()
def forced_predictions(
    verifier: DraftVerifier, edit: Edit, queries: Sequence[Query], replies: Sequence[list[int]]
) -> list[tuple[list[int], list[int]]]:
    """Return the likeliest tokens along these replies, their ends included, before and after the edit."""
    if not queries:
        return []
    before = verifier.likeliest([state.hidden for state in verifier.states_along(queries, replies)])
    asked = queries_after(edit, queries)
    with edit.applied(verifier.model):
        after = verifier.likeliest([state.hidden for state in verifier.states_along(asked, replies)])
    return list(zip(before, after, strict=True))


@torch.inference_mode()
def log_likelihoods(
    verifier: DraftVerifier, edit: Edit, queries: Sequence[Query], replies: Sequence[Reply]
) -> list[tuple[float, float]]:
    """Return the log-likelihood of each reply's tokens, without the end, before and after the edit, in nats."""
    before = [_log_likelihood(verifier, reply, reply.states) for reply in replies]
    last = LastLayer.of(verifier, edit)
    with edit.applied(verifier.model):
        states = _states_after(verifier, last, queries, replies)
        after = [_log_likelihood(verifier, reply, state) for reply, state in zip(replies, states, strict=True)]
    return list(zip(before, after, strict=True))


def _log_likelihood(verifier: DraftVerifier, reply: Reply, states: States) -> float:
    total, size = 0.0, verifier.rows_at_once
    hidden, tokens = states.hidden[: len(reply.tokens)], torch.tensor(reply.tokens, device=states.hidden.device)
    for rows, some in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True):
        logits = vocabulary_logits(verifier.model, rows)
        total += float(logits.double().log_softmax(dim=1).gather(1, some.to(logits.device)[:, None]).sum())
    return total


@torch.inference_mode()
def rank_agreements(
    verifier: DraftVerifier, edit: Edit, queries: Sequence[Query], replies: Sequence[list[int]]
) -> list[tuple[float | None, float | None]]:
    """Return `top10` and `top1` of a `Change` along these replies instead of the model's own."""
    before = verifier.states_along(queries, replies)
    asked = queries_after(edit, queries)
    with edit.applied(verifier.model):
        after = verifier.states_along(asked, replies)
    return [_agreement(one.top, other.top) for one, other in zip(before, after, strict=True)]


def _agreement(before: Tensor | None, after: Tensor | None) -> tuple[float | None, float | None]:
    if before is None or after is None:
        return None, None
    # The last positions, as in MMEdit's code: a fact in the prompt makes the sequence longer.
    size = min(len(before), len(after))
    same = (before[-size:] == after[-size:]).float()
    return float(same.mean()), float(same[:, 0].mean())


def _replies_after(
    verifier: DraftVerifier, queries: Sequence[Query], before: Sequence[Reply], states: Sequence[States]
) -> list[tuple[list[int], str]]:
    """Return tokens and texts after the edit; generated only where the likeliest tokens along the old reply changed."""
    verified = [number for number, reply in enumerate(before) if reply.verified]
    found: dict[int, tuple[list[int], str]] = {}
    replies = verifier.replies(
        [queries[n] for n in verified], [[before[n].tokens] for n in verified], [states[n] for n in verified]
    )
    for number, reply in zip(verified, replies, strict=True):
        found[number] = reply.tokens, reply.text
    # A reply that a forward did not verify before the edit (a near tie) can't be verified after it.
    others = [number for number in range(len(queries)) if number not in found]
    for number, tokens in zip(others, verifier.generate_alone([queries[n] for n in others]), strict=True):
        found[number] = tokens, verifier.text(tokens)
    return [found[number] for number in range(len(queries))]


def _distances(
    verifier: DraftVerifier, before: Float[Tensor, "token vocabulary"], hidden: Float[Tensor, "token hidden"]
) -> tuple[Tensor, Tensor]:
    """Return at each position whether the likeliest token is the same, and KL(before ‖ after) in nats."""
    same, kl, size = [], [], verifier.rows_at_once
    for old, rows in zip(torch.split(before, size), torch.split(hidden, size), strict=True):
        new = vocabulary_logits(verifier.model, rows)
        same.append(old.argmax(dim=1) == new.argmax(dim=1))
        # fp64: the KL of two nearly equal distributions sums terms that nearly cancel.
        first, second = old.double().log_softmax(dim=1), new.double().log_softmax(dim=1)
        second = second.clamp(min=LOWEST_LOG_PROB)
        # A token banned before the edit too gives 0 · −∞, which counts as 0.
        kl.append((first.exp() * (first - second)).nansum(dim=1).clamp(min=0))
    return torch.cat(same).cpu(), torch.cat(kl).cpu()


def _change(before: Reply, after: tuple[list[int], str], states: States, same: Tensor, kl: Tensor) -> Change:
    tokens, text = after
    positions = max(len(before.tokens), len(tokens)) + 1
    # Up to the shorter reply: positions that only one has are not equal.
    equal = sum(old == new for old, new in zip(before.tokens, tokens, strict=False))
    top10, top1 = _agreement(before.states.top, states.top)
    return Change(
        before=before.text,
        after=text,
        span=float(same.float().mean()),
        # Replies of equal length end at the same position.
        greedy_span=(equal + (len(before.tokens) == len(tokens))) / positions,
        kl=float(kl.mean()),
        top10=top10,
        top1=top1,
    )
