"""Rows of what an edit did to captions and answers: where it should change them, and where it should not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmray.data.samples import Sample
from mmray.features.editing.caption_rewriting import replaced, rest_kept
from mmray.features.evaluation.edit_targets import (
    EDITED,
    SOURCE,
    UNRELATED,
    EditTarget,
    EditTargets,
    TargetsOfSample,
    reached,
)
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Change
from mmray.neurons.concepts import Mention
from mmray.objects.lexicon import ObjectLexicon, objects_of

MEASURES = {EDITED: "reliability", SOURCE: "image_generality"}
"""Role of a caption in scope → the measure that it counts for."""


def rewritten(wishes: Sequence[EditTarget], naming: ObjectLexicon, caption: str, language: str | None) -> str | None:
    """Return the caption that these wishes should lead to; None unless they are swaps."""
    words = {wish.source: naming.form(wish.target, language) for wish in wishes if wish.kind == "swap" and wish.target}
    if not wishes or len(words) < len(wishes):
        return None
    exchanged = [
        (replace(mention, concept=naming.form(mention.concept, language).casefold()), words[mention.concept])
        for mention in naming.mentions(caption, language)
        if mention.concept in words
    ]
    return replaced(caption, exchanged, language)


def caption_effects(
    rows: MeasurementBuffer,
    naming: ObjectLexicon,
    sample: Sample,
    scope: TargetsOfSample,
    change: Change,
    *,
    several: bool = False,
) -> None:
    """Add the rows of one caption; `several`: the edit has several purposes, whose success is told one by one too."""
    name, language = sample.sample_id, sample.language
    if scope.role == UNRELATED:
        locality(rows, "image_locality", name, [change])
    named = naming.named(change.before, language), naming.named(change.after, language)
    if scope.foreign:
        rows.share("language_generality", name, 0, reached(scope.foreign, scope.objects, *named))
    if not scope.wishes:
        return
    measure = MEASURES[scope.role]
    rows.share(measure, name, 0, reached(scope.wishes, scope.objects, *named))
    for wish in scope.wishes if several else ():
        rows.share(f"{measure}:{wish.name}", name, 0, reached([wish], scope.objects, *named))
    gone = frozenset[str]().union(*(wish.gone(scope.objects) for wish in scope.wishes))
    mentions = [mention for mention in naming.mentions(change.before, language) if mention.concept in gone]
    whole = Mention(mentions[0].concept, mentions[0].start, mentions[-1].stop)
    rows.share(f"{measure}_rest_unchanged", name, 1, rest_kept(change.before, change.after, whole, language))
    wanted = rewritten(scope.wishes, naming, change.before, language)
    if wanted is not None:
        rows.share(f"{measure}_exact", name, 0, change.after == wanted)


def forced_effects(
    rows: MeasurementBuffer,
    scope: TargetsOfSample,
    name: str,
    tokens: list[int],
    before: Sequence[int],
    after: Sequence[int],
) -> None:
    """Add the rows of a rewritten caption, teacher-forced: its tokens and end, and the likeliest ones along it."""
    measure = f"{MEASURES[scope.role]}_teacher_forced"
    right = [[said == token for said, token in zip(likeliest, tokens, strict=True)] for likeliest in (before, after)]
    rows.share(measure, name, all(right[0]), all(right[1]))
    rows.share(f"{measure}_token", name, sum(right[0]), sum(right[1]), len(tokens))


def generality(
    rows: MeasurementBuffer,
    measures: Sequence[str],
    aim: EditTargets,
    naming: ObjectLexicon,
    sample: Sample,
    change: Change,
) -> None:
    """Add the rows of another prompt or image, where the reply before the edit has a word that should go."""
    objects = objects_of(sample)
    named = naming.named(change.before, sample.language), naming.named(change.after, sample.language)
    if called := aim.called(objects, named[0]):
        success = reached(called, objects, *named)
        for measure in measures:
            rows.share(measure, sample.sample_id, 0, success)


def locality(rows: MeasurementBuffer, measure: str, name: str, changes: Sequence[Change]) -> None:
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
