"""Names of an edit's measures as people read them, and those that compare edits. Needs no torch."""

from __future__ import annotations

WORDS = {
    "bertscore": "BERTScore",
    "bleu": "BLEU",
    "chair_i": "CHAIR_i",
    "chair_s": "CHAIR_s",
    "f1": "F1",
    "kl": "KL",
    "legacy": "(MMEdit's code)",
    "mmedit": "MMEdit",
    "pope": "POPE",
    "pope_yes_ratio": "POPE yes-ratio",
    "text_only_16": "text-only replies unchanged, to 16 tokens",
    "text_only_64": "text-only replies unchanged, to 64 tokens",
    "text_only_kl": "text-only replies, KL per token",
    "perplexity": "perplexity of plain text",
    "perplexity_ratio": "perplexity of plain text, ratio",
    "recall": "object recall",
}
"""Measures, and words in their names, that are not read as they are written."""
COMPARED = (
    "reliability",
    "image_generality",
    "text_generality",
    "image_locality",
    "image_locality_questions",
    "text_locality",
    "text_only_64",
    "perplexity_ratio",
    "pope_yes_ratio_change",
    "hallucination",
    "chair_i",
    "recall",
)
"""Measures in a comparison of edits, in the terminal and in the report."""


def label_of(name: str) -> str:
    """Return a measure's name as text; a pair or purpose after a colon stays as it is."""
    measure, colon, about = name.partition(":")
    return f"{_label(measure)}{colon and ': '}{about}"


def _label(measure: str) -> str:
    if measure in WORDS:
        return WORDS[measure]
    # The longest known beginning first: pope_yes_ratio_change.
    for known in sorted(WORDS, key=len, reverse=True):
        if measure.startswith(f"{known}_"):
            return f"{WORDS[known]} {_label(measure.removeprefix(f'{known}_'))}"
    first, _, rest = measure.partition("_")
    return f"{WORDS.get(first, first)} {_label(rest)}" if rest else first
