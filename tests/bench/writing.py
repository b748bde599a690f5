"""Put a benchmark's table into the README that shows it, between the markers that name the command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([lines[0], f"|{'---|' * len(head)}\n", *lines[1:]])


def between(text: str, command: str, table: str) -> str:
    """Return a page with the table between the markers of the command; raises ValueError where there are none."""
    start, end = f"<!-- figures: {command} -->\n\n", "\n<!-- end -->"
    if text.count(start) != 1:
        raise ValueError(f"no {start.strip()} in the page; put it and {end.strip()} where the table belongs")
    return re.sub(f"({re.escape(start)}).*?({re.escape(end)})", lambda at: at[1] + table + at[2], text, flags=re.DOTALL)


def write(readme: str, command: str, table: str) -> None:
    """Write the table into a README, given by its path from the top of the repository."""
    page = ROOT / readme
    page.write_text(between(page.read_text(encoding="utf-8"), command, table), encoding="utf-8")
