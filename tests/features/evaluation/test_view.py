"""Edits side by side in the terminal."""

import io

from rich.console import Console

from mmray.features.evaluation.view import comparison


def shown(edits) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison(edits))
    return [line.split() for line in console.file.getvalue().splitlines()]


def row(after, n=10):
    return {"before": 0.0, "after": after, "n": n}


def test_only_measures_that_an_edit_has_are_rows_and_an_edit_without_one_has_a_dash():
    edits = {
        "swap": {"reliability": row(0.5), "image_locality": row(0.75), "chair_i": row(None, 0)},
        "truthful": {"image_locality": row(1.0), "hallucination": row(0.25)},
    }
    assert shown(edits) == [
        ["after", "the", "edit", "swap", "truthful"],
        ["reliability", "0.500", "–"],
        ["image", "locality", "0.750", "1.000"],
        ["hallucination", "–", "0.250"],
    ]
