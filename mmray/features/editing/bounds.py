"""How much an edit may change: bounds on its measures, and the verdict in words. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Bound:
    """The values that a measure may have after an edit, and what a verdict says of it."""

    measure: str
    subject: str
    """What is measured."""
    figure: str
    """How its value is told; {} is the value."""
    kept: str
    """Said if the value is within the bound. Neighbours with the same words are one statement."""
    broken: str
    at_least: float | None = None
    at_most: float | None = None

    def allows(self, value: float) -> bool:
        """Return whether a value is within the bound."""
        return not self.excess(value)

    def excess(self, value: float) -> float:
        """Return by how much a value is beyond the bound, as a fraction of the limit; 0 within it."""
        limits = [limit for limit in (self.at_least, self.at_most) if limit is not None]
        under = self.at_least is not None and value < self.at_least
        over = self.at_most is not None and value > self.at_most
        # The nearer limit is the one that is broken.
        return min(abs(value - limit) / abs(limit) for limit in limits) if under or over else 0.0

    @property
    def limit(self) -> str:
        """The bound as text."""
        return " to ".join(f"{limit:g}" for limit in (self.at_least, self.at_most) if limit is not None)


_TEXT = ("leaves text-only replies", "changes text-only replies")

BOUNDS = (
    Bound("reliability", "captions that it was made on", "{} of its captions", "takes", "does not take", at_least=0.95),
    Bound(
        "image_generality",
        "other images of the concept",
        "{} of them",
        "carries over to other images",
        "does not carry over to other images",
        at_least=0.85,
    ),
    Bound("image_locality", "captions", "{} unchanged", "leaves captions", "changes captions", at_least=0.95),
    Bound(
        "image_locality_questions",
        "answers about images",
        "{} unchanged",
        "leaves answers about images",
        "changes answers about images",
        at_least=0.95,
    ),
    Bound("text_only_16", "text-only replies of up to 16 tokens", "{} unchanged of up to 16 tokens", *_TEXT, 0.90),
    Bound("text_only_64", "text-only replies of up to 64 tokens", "{} unchanged of up to 64 tokens", *_TEXT, 0.75),
    Bound("text_only_kl", "KL of text-only replies", "KL of {} nats per token", *_TEXT, at_most=0.005),
    Bound(
        "perplexity_ratio",
        "perplexity of plain text",
        "perplexity × {}",
        "leaves plain text",
        "changes plain text",
        at_least=0.99,
        at_most=1.01,
    ),
    Bound(
        "pope_yes_ratio_change",
        "POPE's yes-ratio",
        "by {}",
        "leaves the yes-ratio",
        "moves the yes-ratio",
        at_least=-0.03,
        at_most=0.03,
    ),
)
"""Every bound of an edit that changes one thing, in the order of the verdict."""
TEXT_ONLY = frozenset(bound.measure for bound in BOUNDS if (bound.kept, bound.broken) == _TEXT)
"""Measures of what an edit does to text-only replies."""


def verdict(values: Mapping[str, float | None]) -> dict[str, Any]:
    """Return what an edit's measures say under the bounds; `values`: measure → its value after the edit.

    `statements` is the verdict in plain words, each statement with whether it is good; `words` has them in one text.
    `bounds` has each bound with its value and whether it passed; `passed` is that of all. A measure without a value
    passes nothing: None, unless another bound is broken.
    """
    checked = [(bound, values.get(bound.measure)) for bound in BOUNDS]
    passed = [None if value is None else bound.allows(value) for bound, value in checked]
    rows = [
        {"measure": bound.measure, "at_least": bound.at_least, "at_most": bound.at_most, "value": value, "passed": each}
        for (bound, value), each in zip(checked, passed, strict=True)
    ]
    whole = False if False in passed else None if None in passed else True
    statements = _statements(checked)
    words = "; ".join(one["words"] for one in statements)
    return {"words": words, "statements": statements, "passed": whole, "bounds": rows}


def _statements(checked: list[tuple[Bound, float | None]]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []
    for (kept, broken), group in groupby(checked, key=lambda pair: (pair[0].kept, pair[0].broken)):
        known = [(bound, value) for bound, value in group if value is not None]
        figures = [
            f"{bound.figure.format(f'{value:.4g}')}, bound {bound.limit}"
            for bound, value in known
            if not bound.allows(value)
        ]
        if figures:
            said.append({"words": f"{broken} ({'; '.join(figures)})", "passed": False})
        elif known:
            said.append({"words": kept, "passed": True})
    if missing := [bound.subject for bound, value in checked if value is None]:
        said.append({"words": f"not measured: {', '.join(missing)}", "passed": None})
    return said
