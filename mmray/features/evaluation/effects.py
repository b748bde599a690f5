"""Measure what an edit did to captions and answers: where it should change them, and where it should not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmray.data.samples import Sample
from mmray.features.editing.caption_rewriting import replaced, rest_kept
from mmray.features.evaluation.edit_requests import (
    EDITED,
    SOURCE,
    UNRELATED,
    EditRequest,
    EditRequests,
    SampleScope,
    fulfilled,
)
from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import Change
from mmray.neurons.concepts import Mention
from mmray.objects.lexicon import ObjectLexicon, objects_of

MEASURE_BY_ROLE = {EDITED: "reliability", SOURCE: "image_generality"}
"""Role of a caption that should change → the measure that it counts for."""


def expected_caption(
    requests: Sequence[EditRequest], lexicon: ObjectLexicon, caption: str, language: str | None
) -> str | None:
    """Return the caption that these requests should lead to; None unless all are swaps."""
    words = {
        request.source: lexicon.form(request.target, language)
        for request in requests
        if request.kind == "swap" and request.target
    }
    # Other edits than swaps leave open how the caption goes on, so no single one is right.
    if not requests or len(words) < len(requests):
        return None
    exchanged = [
        (replace(mention, concept=lexicon.form(mention.concept, language).casefold()), words[mention.concept])
        for mention in lexicon.mentions(caption, language)
        if mention.concept in words
    ]
    return replaced(caption, exchanged, language)


def caption_effects(
    rows: MeasurementBuffer,
    lexicon: ObjectLexicon,
    sample: Sample,
    scope: SampleScope,
    change: Change,
    *,
    several: bool = False,
) -> None:
    """Add the measurements of one caption; `several` adds the success of each of the edit's purposes."""
    name, language = sample.sample_id, sample.language
    if scope.role == UNRELATED:
        locality(rows, "image_locality", name, [change])
    named = lexicon.named(change.before, language), lexicon.named(change.after, language)
    # An edit made in one language may act in others; that has a measure of its own.
    if scope.foreign:
        rows.share("language_generality", name, 0, fulfilled(scope.foreign, scope.objects, *named))
    if not scope.requests:
        return
    # No other role is possible: a sample with requests is an edited or a source one.
    measure = MEASURE_BY_ROLE[scope.role]
    # 0 before: a request applies only where the caption had an unwanted word.
    rows.share(measure, name, 0, fulfilled(scope.requests, scope.objects, *named))
    for request in scope.requests if several else ():
        rows.share(f"{measure}:{request.name}", name, 0, fulfilled([request], scope.objects, *named))
    unwanted = frozenset[str]().union(*(request.unwanted(scope.objects) for request in scope.requests))
    mentions = [mention for mention in lexicon.mentions(change.before, language) if mention.concept in unwanted]
    # From the first unwanted noun to the last: the rest is what stands before and after them all.
    span = Mention(mentions[0].concept, mentions[0].start, mentions[-1].stop)
    rows.share(f"{measure}_rest_unchanged", name, 1, rest_kept(change.before, change.after, span, language))
    expected = expected_caption(scope.requests, lexicon, change.before, language)
    if expected is not None:
        rows.share(f"{measure}_exact", name, 0, change.after == expected)


def teacher_forced_effects(
    rows: MeasurementBuffer,
    scope: SampleScope,
    name: str,
    tokens: list[int],
    before: Sequence[int],
    after: Sequence[int],
) -> None:
    """Add the measurements of an expected caption: its tokens and end, and the likeliest ones along it."""
    measure = f"{MEASURE_BY_ROLE[scope.role]}_teacher_forced"
    right = [[found == token for found, token in zip(likeliest, tokens, strict=True)] for likeliest in (before, after)]
    rows.share(measure, name, all(right[0]), all(right[1]))
    rows.share(f"{measure}_token", name, sum(right[0]), sum(right[1]), len(tokens))


def generality(
    rows: MeasurementBuffer,
    measures: Sequence[str],
    requests: EditRequests,
    lexicon: ObjectLexicon,
    sample: Sample,
    change: Change,
) -> None:
    """Add the measurements of another prompt or image, if the reply before the edit has an unwanted word."""
    objects = objects_of(sample)
    named = lexicon.named(change.before, sample.language), lexicon.named(change.after, sample.language)
    if applicable := requests.applicable(objects, named[0]):
        success = fulfilled(applicable, objects, *named)
        for measure in measures:
            rows.share(measure, sample.sample_id, 0, success)


def locality(rows: MeasurementBuffer, measure: str, name: str, changes: Sequence[Change]) -> None:
    """Add the measurements of replies that should stay as they are, by every protocol."""
    if not changes:
        return
    rows.kept(measure, name, [change.same for change in changes])
    rows.kept(f"{measure}_span", name, [change.span for change in changes])
    rows.kept(f"{measure}_greedy_span", name, [change.greedy_span for change in changes])
    rows.share(f"{measure}_kl", name, 0, sum(change.kl for change in changes), len(changes))
    rows.kept(f"{measure}_legacy", name, [change.top10 for change in changes if change.top10 is not None])
    rows.kept(f"{measure}_legacy_top1", name, [change.top1 for change in changes if change.top1 is not None])
