"""Measure objects that are named but absent: CHAIR, POPE, and pairs of a context and a hallucinated word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmray.features.evaluation.measurement_buffer import MeasurementBuffer
from mmray.features.evaluation.queries import TextChange
from mmray.objects.answers import Parser, says_yes
from mmray.objects.lexicon import ObjectLexicon

CONFIRMING = 0.5
"""Lowest confidence at which a detector confirms an object."""
WORDS = re.compile(r"\w+(?:[-'’]\w+)*")


def chair(
    rows: MeasurementBuffer,
    lexicon: ObjectLexicon,
    name: str,
    objects: frozenset[str],
    language: str | None,
    before: str,
    after: str,
) -> None:
    """Add a caption's part in CHAIR (Rohrbach et al. 2018), object recall and mean length.

    CHAIR_i: mentions of absent objects as a fraction of all mentions. CHAIR_s: captions with such a mention as a
    fraction of all captions.
    """
    parts = []
    for caption in (before, after):
        # A list: CHAIR_i counts every mention, recall each object once.
        mentioned = [mention.concept for mention in lexicon.mentions(caption, language)]
        wrong = sum(concept not in objects for concept in mentioned)
        found = len(objects.intersection(mentioned))
        parts.append((wrong, len(mentioned), found, len(WORDS.findall(caption))))
    rows.add("chair_i", name, parts[0][:2], parts[1][:2])
    rows.share("chair_s", name, parts[0][0] > 0, parts[1][0] > 0)
    rows.share("recall", name, parts[0][2], parts[1][2], len(objects))
    rows.share("mean_length", name, parts[0][3], parts[1][3])


def hallucinated(
    rows: MeasurementBuffer,
    pairs: Sequence[tuple[str, str]],
    name: str,
    objects: frozenset[str],
    before: set[str],
    after: set[str],
) -> None:
    """Add, for each pair whose context is present, whether the word is named: one measure if absent, one if present."""
    for context, word in pairs:
        if context in objects:
            measure = "companion_named" if word in objects else "hallucination"
            rows.share(measure, name, word in before, word in after)
            rows.share(f"{measure}:{context}→{word}", name, word in before, word in after)


def confirmed(
    rows: MeasurementBuffer, name: str, confidence: Mapping[str, float], before: set[str], after: set[str]
) -> None:
    """Add how many of the objects that a caption names a detector confirms, and of those that the edit added."""

    def counts(named: set[str]) -> tuple[float, float]:
        return float(sum(confidence[word] >= CONFIRMING for word in named)), float(len(named))

    # A caption that names nothing has nothing to confirm.
    if before | after:
        rows.add("confirmed", name, counts(before), counts(after))
    if after - before:
        # Before the edit, none of these was named.
        rows.add("confirmed_new", name, (0.0, 0.0), counts(after - before))


def pope(
    rows: MeasurementBuffer,
    name: str,
    present: Sequence[str],
    absent: Mapping[str, Sequence[str]],
    changes: Mapping[str, TextChange],
    parser: Parser = "sentences",
) -> None:
    """Add a sample's part in POPE (Li et al. 2023); `changes` has each object's answers before and after the edit."""
    for strategy, others in absent.items():
        # As in POPE, the same present objects count in each setting, against its own absent ones.
        of_present, of_absent = ([changes[thing] for thing in things] for things in (present, others))
        before = _pope_sums([change.before for change in of_present], [change.before for change in of_absent], parser)
        after = _pope_sums([change.after for change in of_present], [change.after for change in of_absent], parser)
        for figure, sums in before.items():
            rows.add(f"pope_{strategy}_{figure}", name, sums, after[figure])
        yes, asked = before["yes_ratio"]
        # Parts of one sample add up: these two measures are over all strategies.
        rows.add("pope_yes_ratio", name, (yes, asked), after["yes_ratio"])
        # Paired, because both answers are to one question: its interval is narrower than that of two ratios.
        rows.add("pope_yes_ratio_change", name, (0, asked), (after["yes_ratio"][0] - yes, asked))


def _pope_sums(present: Sequence[str], absent: Sequence[str], parser: Parser) -> dict[str, tuple[int, int]]:
    """Return what each figure of POPE counts, and of how many, from answers about present and absent objects."""
    of_present, of_absent = ([says_yes(answer, parser) for answer in answers] for answers in (present, absent))
    yes_present, yes_absent = of_present.count(True), of_absent.count(True)
    asked = len(present) + len(absent)
    return {
        # An answer with neither yes nor no is right about nothing.
        "accuracy": (yes_present + of_absent.count(False), asked),
        "precision": (yes_present, yes_present + yes_absent),
        "recall": (yes_present, len(present)),
        # Sums over samples can be added up for F1 in this form, and not for the mean of two ratios.
        "f1": (2 * yes_present, yes_present + yes_absent + len(present)),
        "yes_ratio": (yes_present + yes_absent, asked),
        "unparsable": (of_present.count(None) + of_absent.count(None), asked),
    }
