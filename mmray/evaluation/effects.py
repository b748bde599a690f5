"""Rows of what an edit did to captions and answers: where it should change them, and where it should not."""

from __future__ import annotations

from collections.abc import Sequence

from mmray.datasets.samples import Sample
from mmray.evaluation.asks import Change
from mmray.evaluation.naming import Naming
from mmray.evaluation.rows import Rows
from mmray.evaluation.scope import EDITED, SOURCE, UNRELATED, Aim, Scope
from mmray.evaluation.wording import replaced, rest_kept
from mmray.neurons.concepts import Mention

MEASURES = {EDITED: "reliability", SOURCE: "image_generality"}
"""Role of a caption in scope → the measure that it counts for."""


def rewritten(aim: Aim, naming: Naming, caption: str, language: str | None) -> str | None:
    """Return the caption that a swap should lead to; None for other edits."""
    if aim.kind != "swap" or aim.target is None:
        return None
    mentions = [mention for mention in naming.mentions(caption, language) if mention.concept == aim.source]
    return replaced(caption, mentions, naming.form(aim.target, language)) if mentions else None


def caption_effects(rows: Rows, aim: Aim, naming: Naming, sample: Sample, scope: Scope, change: Change) -> None:
    """Add the rows of one caption."""
    name, language = sample.sample_id, sample.language
    if scope.role == UNRELATED and not scope.foreign:
        locality(rows, "image_locality", name, [change])
    if not scope.gone:
        return
    named = naming.named(change.before, language), naming.named(change.after, language)
    success = aim.reached(scope.gone, named[1])
    if scope.foreign:
        rows.share("language_generality", name, 0, success)
    if not scope.in_scope:
        return
    measure = MEASURES[scope.role]
    rows.share(measure, name, 0, success)
    mentions = [mention for mention in naming.mentions(change.before, language) if mention.concept in scope.gone]
    whole = Mention(mentions[0].concept, mentions[0].start, mentions[-1].stop)
    rest = rest_kept(change.before, change.after, whole, language)
    rows.share(f"{measure}_rest_unchanged", name, 1, rest)
    wanted = rewritten(aim, naming, change.before, language)
    if wanted is not None:
        rows.share(f"{measure}_exact", name, 0, change.after == wanted)


def forced_effects(
    rows: Rows, scope: Scope, name: str, tokens: list[int], before: Sequence[int], after: Sequence[int]
) -> None:
    """Add the rows of a rewritten caption, teacher-forced: its tokens and end, and the likeliest ones along it."""
    measure = f"{MEASURES[scope.role]}_teacher_forced"
    right = [[said == token for said, token in zip(likeliest, tokens, strict=True)] for likeliest in (before, after)]
    rows.share(measure, name, all(right[0]), all(right[1]))
    rows.share(f"{measure}_token", name, sum(right[0]), sum(right[1]), len(tokens))


def generality(
    rows: Rows, measures: Sequence[str], aim: Aim, naming: Naming, sample: Sample, gone: frozenset[str], change: Change
) -> None:
    """Add the rows of one other prompt or image, where the reply before the edit has a word that should go."""
    if gone & naming.named(change.before, sample.language):
        success = aim.reached(gone, naming.named(change.after, sample.language))
        for measure in measures:
            rows.share(measure, sample.sample_id, 0, success)


def locality(rows: Rows, measure: str, name: str, changes: Sequence[Change]) -> None:
    """Add the rows of replies that should be as before, by every protocol."""
    if not changes:
        return
    rows.kept(measure, name, [change.same for change in changes])
    rows.kept(f"{measure}_span", name, [change.span for change in changes])
    rows.kept(f"{measure}_greedy_span", name, [change.greedy_span for change in changes])
    rows.share(f"{measure}_kl", name, 0, sum(change.divergence for change in changes), len(changes))
    for protocol, values in (
        ("legacy", [change.ranks for change in changes]),
        ("legacy_top1", [change.firsts for change in changes]),
    ):
        rows.kept(f"{measure}_{protocol}", name, [value for value in values if value is not None])
