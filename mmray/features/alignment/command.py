"""The command `align`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from mmray.features.alignment.settings import AlignmentSettings, alignment_settings
from mmray.terminal.options import (
    INCOMPLETE,
    AsJson,
    app,
    command_line,
    console,
    say,
    say_json,
    say_next,
    show_progress,
    with_settings,
)


@app.command(
    group="Models", examples=("mmray align --tower demo --model demo --data demo --out aligned --validate-on demo",)
)
@with_settings(AlignmentSettings)
def align(as_json: AsJson = False, **settings: Any) -> None:
    """Train a network that lets a LLaVA see through a detector's tower."""
    from mmray.features.alignment.job import run_alignment
    from mmray.features.evaluation.view import measures

    checked = alignment_settings(settings)
    with show_progress("images") as follow:
        outcome = run_alignment(checked, follow)
    if as_json:
        say_json(asdict(outcome))
    else:
        title = f"{checked.model} with its own tower (before) and with {checked.tower} (after)"
        console.print(measures(outcome.measures, title, everything=True))
        say(
            f"{outcome.images:,} images in {outcome.steps:,} steps, loss {outcome.loss:.4f}, "
            f"{outcome.seconds:.0f} s → {checked.out}"
        )
        if outcome.lost or outcome.failures:
            say(f"{outcome.lost:,} images could not be read, {outcome.failures:,} samples not measured", "yellow")
        for number, reason in outcome.quarantined.items():
            say(f"unit {number} of the validation quarantined: {reason}", "red")
        say_next(command_line("hallucination", "RUN", "--detector", checked.tower, "--alignment", checked.out))
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)
