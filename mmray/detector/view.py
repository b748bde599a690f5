"""What the terminal says about an aligned network next to results that it took part in."""

from __future__ import annotations

from mmray.terminal.options import say

LABELS = {"recall": "recall of objects", "pope_random_f1": "POPE (random) F1"}
"""The measures of an alignment that are shown."""


def say_alignment(folder: str | None) -> None:
    """Say how well the model does through an aligned network, compared with its own tower. None: it uses none."""
    if folder is not None:
        from mmray.detector.alignment import alignment_measures
        from mmray.terminal.tables import number

        measures = alignment_measures(folder)
        parts = [
            f"{label} {number(measures[name]['after'])} (its own: {number(measures[name]['before'])})"
            for name, label in LABELS.items()
            if name in measures
        ]
        say(f"through the aligned network {folder}: {', '.join(parts)}")
