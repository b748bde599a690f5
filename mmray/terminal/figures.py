"""Format numbers for tables in the terminal."""

from __future__ import annotations


def number(value: float | None) -> str:
    """Return a measure with three decimals, without a negative zero; a dash for None."""
    return "–" if value is None else f"{value:z.3f}"
