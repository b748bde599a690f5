"""The commands `mmray edit` and `mmray apply`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from mmray.features.census.settings import CensusSettings
from mmray.features.editing.settings import EditSettings, edit_settings
from mmray.models.options import Dtype
from mmray.terminal.options import (
    AsJson,
    RunArgument,
    app,
    command_line,
    option,
    plural,
    say,
    say_json,
    say_next,
    warn,
    with_settings,
)

BEYOND_BOUNDS = 3
"""Exit status if an edit is not saved because of what else it changes, or because it does not take."""


@app.command(
    group="Edit",
    examples=(
        "mmray edit runs/llava --source dog --target cat --out edits/dog-cat",
        "mmray edit runs/llava --suppress bomb --out edits/no-bomb",
    ),
)
@with_settings(EditSettings)
def edit(
    run: RunArgument,
    out: Annotated[str, typer.Option("--out", help="Folder of the edit: a local path or s3://bucket/prefix.")],
    allow_collateral: Annotated[
        bool,
        typer.Option("--allow-collateral", help="Save the edit even if it does not take or changes other replies."),
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Edit located neurons to replace a word, suppress it, or reduce hallucination.

    Before it is saved, an edit is measured on answers that it was not learned from. One beyond a bound is not saved:
    exit status 3.
    """
    # Imported late, because --help and other commands must not wait for torch.
    from mmray.features.editing.bounds import verdict
    from mmray.features.editing.edit import check_free
    from mmray.features.editing.methods import edit_run
    from mmray.runs.driver import drive_analysis
    from mmray.runs.run import open_run

    checked = edit_settings(settings)
    # Refused before the model is loaded and the edit learned.
    analysed = open_run(run)
    check_free(out, [checked], analysed.uri)
    with drive_analysis(out) as lease:
        made = edit_run(analysed, checked)
        facts, purpose = made.facts, made.purpose
        refused = bool(facts["broken"]) and not allow_collateral
        if not as_json:
            say(f"on answers that it was not learned from: {verdict(facts['validation'])['words']}")
            if facts["validation"]:
                say("  " + ", ".join(f"{name} {value:g}" for name, value in facts["validation"].items()))
        if not refused:
            # Learning may take minutes, in which another process may have taken over the folder.
            lease.verify()
            made.save(out)
    if as_json:
        say_json({"purposes": [asdict(purpose) for purpose in made.purposes], "saved": not refused, **facts})
    elif not refused:
        changed = f"{plural(facts['rows_changed'], 'neuron')} changed in {facts['seconds']:.0f} s"
        say(f"{purpose.summary}: {changed} → {out}")
        say_next(command_line("evaluate", run, "--edit", out, "--data", "DATA"))
    if refused:
        warn(
            f"{purpose.summary}: not saved, {len(facts['broken'])} of its measures are beyond their bounds; give other "
            "--neurons or another --method, or --allow-collateral to save it as it is"
        )
        raise typer.Exit(BEYOND_BOUNDS)


@app.command(group="Edit", examples=("mmray apply edits/dog-cat --model llava-hf/llava-1.5-7b-hf --out edited",))
def apply(
    edit: Annotated[str, typer.Argument(metavar="EDIT", help="Folder of an edit.")],
    model: Annotated[str, option("model", CensusSettings)],
    out: Annotated[str, typer.Option("--out", help="Local folder of the edited checkpoint; it must be empty.")],
    dtype: Annotated[Dtype, option("dtype", CensusSettings)] = "auto",
    trust_remote_code: Annotated[bool, option("trust_remote_code", CensusSettings)] = False,
) -> None:
    """Write a complete edited checkpoint, which from_pretrained loads."""
    from mmray.features.editing.checkpoint import write_checkpoint
    from mmray.features.editing.edit import open_edit
    from mmray.models.loading import load

    made = open_edit(edit)
    write_checkpoint(load(model, dtype, trust_remote_code=trust_remote_code), made, out)
    say(f"{plural(len(made.neurons), 'neuron')} edited → {out}")
    say_next(command_line("check-model", out))
