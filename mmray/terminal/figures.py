"""How numbers are written in tables of the terminal."""

from __future__ import annotations

DIGITS = 3


def number(value: float | None) -> str:
    """Return a measure's value; a dash where there is none."""
    return "–" if value is None else f"{value:z.{DIGITS}f}"
