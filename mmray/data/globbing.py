"""Glob and brace patterns of file names, with the same meaning on disk and on S3."""

from __future__ import annotations

import re
from itertools import product

SPECIAL = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
WILDCARDS = re.compile(r"(\*\*/|\*|\?|\[[^\]]*\])")
MEANINGS = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern with `{a,b}` or `{000..003}` stands for, in order; a range keeps its leading zeros."""
    parts = BRACES.split(pattern)
    choices = [_alternatives(part) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def glob_expression(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a glob: `*` stays within a folder, `**/` crosses them, as for local paths."""
    expression = ""
    for piece in WILDCARDS.split(pattern):
        if len(piece) > 2 and piece.startswith("["):
            expression += "[^" + piece[2:] if piece[1] == "!" else piece
        else:
            expression += MEANINGS.get(piece, re.escape(piece))
    return re.compile(expression)


def _alternatives(inside: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds is None:
        return inside.split(",")
    first, last = bounds.groups()
    width = len(first) if first.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
