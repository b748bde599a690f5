"""Commands: a detector's second opinion on the model's claims, and answers about perturbed embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmray.detector.view import say_alignment
from mmray.features.hallucination.settings import (
    HallucinationSettings,
    PerturbationSettings,
    hallucination_settings,
    perturbation_settings,
)
from mmray.terminal.options import (
    AsJson,
    RunArgument,
    app,
    console,
    finish,
    run_with_progress,
    say,
    say_json,
    with_settings,
)

if TYPE_CHECKING:
    from mmray.engine import JobResult


@app.command(
    group="Understand",
    examples=("mmray hallucination runs/llava", "mmray hallucination runs/llava --pictures mistakes"),
)
@with_settings(HallucinationSettings)
def hallucination(
    run: RunArgument,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Folder to write pictures of mistakes to.")
    ] = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Ask a detector whether the objects that the model names are there."""
    from mmray.features.hallucination.job import HallucinationJob
    from mmray.features.hallucination.view import mistakes, opinions
    from mmray.runs.run import open_run

    checked = hallucination_settings({"run": run, **settings})
    done = run_with_progress(HallucinationJob(checked))
    found = open_run(run).table("mistakes").to_pylist()
    if pictures is not None:
        _save_pictures(pictures, found)
    if as_json:
        say_json(done.summary())
    else:
        console.print(opinions(done.headline["measures"]))
        if found:
            console.print(mistakes(found))
        say_alignment(checked.alignment)
    _end(done, "claims", checked.run, as_json)


@app.command(
    group="Understand",
    examples=(
        "mmray perturb --model demo --data demo --out moved",
        "mmray perturb --model demo --data demo --out moved --local",
    ),
)
@with_settings(PerturbationSettings)
def perturb(as_json: AsJson = False, **settings: Any) -> None:
    """Move an image's embedding from one concept to another, and ask again."""
    from mmray.features.hallucination.perturb_job import PerturbJob
    from mmray.features.hallucination.view import changes

    checked = perturbation_settings(settings)
    done = run_with_progress(PerturbJob(checked))
    if as_json:
        say_json(done.summary())
    else:
        console.print(changes(done.headline["measures"]))
        say_alignment(checked.alignment)
    _end(done, "answers", checked.out, as_json)


def _save_pictures(folder: Path, found: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(found):
        name = f"{number:03d} {row['word']} for {row['mistaken_for'] or 'nothing'} in {row['sample_id']}.png"
        # Sample names may be paths.
        (folder / name.replace("/", "_")).write_bytes(row["picture"])


def _end(done: JobResult, noun: str, folder: str, as_json: bool) -> None:
    """Say where the rows are and what failed, and exit with the status for it."""
    if not as_json:
        say(f"{done.headline['rows']:,} {noun} of {done.done:,} samples in {done.seconds:.0f} s → {folder}")
    finish(done, "sample", quiet=as_json)
