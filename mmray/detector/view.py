"""What the terminal says of an aligned network that a model looks through."""

from __future__ import annotations

from mmray.terminal.options import say

TOLD = {"recall": "recall of objects", "pope_random_f1": "POPE (random) F1"}
"""Measures of an alignment next to what is found by it."""


def say_sight(alignment: str | None) -> None:
    """Say how well a model does by the sight that an aligned network gives it, if one does."""
    if alignment is not None:
        from mmray.detector.alignment import alignment_measures
        from mmray.terminal.figures import number

        found = alignment_measures(alignment)
        told = [
            f"{words} {number(found[name]['after'])} (its own: {number(found[name]['before'])})"
            for name, words in TOLD.items()
            if name in found
        ]
        say(f"by the sight of {alignment}: {', '.join(told)}")
