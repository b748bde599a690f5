"""Commands: a detector's second opinion on the model's claims, and answers about perturbed embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmray.detector.view import say_alignment
from mmray.errors import InputError
from mmray.features.hallucination.settings import (
    BiasSettings,
    DoseSettings,
    HallucinationSettings,
    NeuronSettings,
    PerturbationSettings,
    bias_settings,
    hallucination_settings,
    neuron_settings,
    perturbation_settings,
)
from mmray.terminal.options import (
    AsJson,
    RunArgument,
    app,
    command_line,
    console,
    finish,
    run_with_progress,
    say,
    say_json,
    say_next,
    show_progress,
    with_settings,
)

if TYPE_CHECKING:
    from mmray.engine import JobResult


@app.command(
    group="Understand",
    examples=(
        "mmray hallucination runs/demo --pictures mistakes",
        "mmray hallucination runs/llava --detector google/owlvit-base-patch32 --alignment aligned",
        "mmray hallucination runs/llava --data coco --neurons --interventions",
    ),
)
@with_settings(NeuronSettings, shard_size=None)
def hallucination(
    run: RunArgument,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Folder to write pictures of mistakes to.")
    ] = None,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Find the neurons that predict which mentions are hallucinated.")
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Ask a detector whether named objects are there, or find neurons that predict it."""
    _refuse_idle({**settings, "pictures": pictures}, neurons=neurons)
    # The two have different shards by default.
    given = {"run": run} | {name: value for name, value in settings.items() if name != "shard_size" or value}
    if neurons:
        _find_neurons(neuron_settings(given), as_json=as_json)
        return
    from mmray.features.hallucination.job import HallucinationJob
    from mmray.features.hallucination.view import mistakes, opinions
    from mmray.runs.run import open_run

    # The command takes the options of both analyses, and settings refuse a name that is not theirs.
    own = {name: value for name, value in given.items() if name in HallucinationSettings.model_fields}
    checked = hallucination_settings(own)
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
    _end(done, "claims", checked.run, command_line("report", checked.run), as_json)


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
    _end(done, "answers", checked.out, command_line("status", checked.out), as_json)


@app.command(
    group="Understand",
    examples=('mmray bias runs/demo --pair cat:dog --unrelated sun --unrelated egg --question "How old, 1 to 10?"',),
)
@with_settings(BiasSettings)
def bias(run: RunArgument, as_json: AsJson = False, **settings: Any) -> None:
    """Ask about portraits whose embeddings move between two prompts."""
    from mmray.features.hallucination.bias_job import BiasJob
    from mmray.features.hallucination.view import bias as show

    checked = bias_settings({"run": run, **settings})
    done = run_with_progress(BiasJob(checked))
    if as_json:
        say_json(done.summary())
    else:
        console.print(show(done.headline["measures"]))
        say_alignment(checked.alignment)
    _end(done, "answers", checked.run, command_line("report", checked.run), as_json)


def _refuse_idle(settings: Mapping[str, Any], *, neurons: bool) -> None:
    """Raise InputError for an option that would do nothing here: one of the other analysis, or of a later pass."""
    own = HallucinationSettings.model_fields.keys()
    of_neurons, of_doses = NeuronSettings.model_fields.keys() - own, DoseSettings.model_fields.keys() - own
    needs = {
        "--neurons": () if neurons else of_neurons,
        "--interventions": () if settings["interventions"] else of_doses,
    }
    for other, names in needs.items():
        for name in sorted(names):
            if settings[name] != NeuronSettings.model_fields[name].get_default(call_default_factory=True):
                raise InputError(f"hallucination: --{name.replace('_', '-')} is for {other}; give both")
    for name in ("pictures", "pope") if neurons else ():
        if settings[name] is not None:
            raise InputError(f"hallucination: --{name} is not for --neurons; leave one out")


def _find_neurons(settings: NeuronSettings, *, as_json: bool) -> None:
    from mmray.features.hallucination.neuron_driver import run_neurons
    from mmray.features.hallucination.view import doses, probe

    with show_progress() as follow:
        result = run_neurons(settings, follow)
    found = result.headline
    if as_json:
        say_json(found)
    else:
        console.print(probe(found["measures"]))
        if "doses" in found:
            console.print(doses(found["doses"]))
        seconds = sum(one.seconds for one in result.passes)
        say(f"{found['neurons']:,} neurons from {found['rows']:,} mentions in {seconds:.0f} s → {settings.run}")
        say_next(command_line("report", settings.run))
    # Last of all, because it exits at the first pass that is incomplete.
    for one in result.passes:
        finish(one, "sample", quiet=as_json)


def _save_pictures(folder: Path, found: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(found):
        name = f"{number:03d} {row['word']} for {row['mistaken_for'] or 'nothing'} in {row['sample_id']}.png"
        # Sample names may be paths.
        (folder / name.replace("/", "_")).write_bytes(row["picture"])


def _end(done: JobResult, noun: str, folder: str, following: str, as_json: bool) -> None:
    """Say where the rows are and what failed, and exit with the status for it."""
    if not as_json:
        say(f"{done.headline['rows']:,} {noun} of {done.done:,} samples in {done.seconds:.0f} s → {folder}")
        say_next(following)
    finish(done, "sample", quiet=as_json)
