"""The command line: parse, call, print. Exit status 0 done, 2 bad input, 3 drift, 4 finished but something failed."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from mmray.errors import InputError
from mmray.settings import CensusSettings, Dtype, census_settings, describe

if TYPE_CHECKING:
    from mmray.cluster.census import Outcome

BAD_INPUT = 2
"""Exit status of a call that can't be carried out as it is."""
INCOMPLETE = 4
"""Exit status of a run that ended although some samples or shards failed."""

UsageError: Any = typer.BadParameter.__bases__[0]
"""What a wrong option raises; where it lies depends on typer's version."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Multi-modal neurons of vision-language models, found and ranked as distributed Ray jobs.",
)
console = Console(highlight=False, soft_wrap=False)


def _option(name: str) -> Any:
    return typer.Option(f"--{name.replace('_', '-')}", help=describe(name))


def _with_settings(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every setting of a census as an option, handed on as a keyword; `defaults` are its own."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, inspect.Parameter.empty if field.is_required() else field.default),
                annotation=Annotated[field.annotation, _option(name)],
            )
            for name, field in CensusSettings.model_fields.items()
        ]
        parameters += [
            value.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for value in inspect.signature(command, eval_str=True).parameters.values()
            if value.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        # typer reads the types from the one and the rest from the other.
        command.__annotations__ = {value.name: value.annotation for value in parameters}
        vars(command)["__signature__"] = inspect.Signature(parameters)
        return command

    return give


DtypeName = Annotated[Dtype, _option("dtype")]
TrustRemoteCode = Annotated[bool, _option("trust_remote_code")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: a local path or s3://bucket/prefix.")]


@app.command()
@_with_settings()
def census(as_json: AsJson = False, **settings: Any) -> None:
    """Capture, score, reduce and rank every neuron on image-caption data. Run again, it goes on where it stopped."""
    outcome = _run_census(census_settings(settings))
    if as_json:
        print(json.dumps(asdict(outcome)))
    else:
        _say_outcome(outcome)
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


@app.command()
@_with_settings(out="runs/plan")
def plan(as_json: AsJson = False, **settings: Any) -> None:
    """Say what a census would cost: samples, shards, hours, bytes. Nothing is run."""
    from mmray.cluster.census import plan_census
    from mmray.results.terminal import plan as show

    estimate = plan_census(census_settings(settings))
    if as_json:
        print(json.dumps(asdict(estimate) | {"hours": estimate.hours}))
    else:
        console.print(show(estimate))


@app.command()
def status(run: RunArgument, as_json: AsJson = False) -> None:
    """Say how far a run is: shards done, pending, set aside; samples a second; failures with reasons."""
    from mmray.results.run import open_run
    from mmray.results.terminal import status as show

    opened = open_run(run)
    found = opened.status()
    if as_json:
        rates = {"pending": found.pending, "samples_per_second": found.samples_per_second}
        print(json.dumps(asdict(found) | rates | {"first_failures": opened.failures()}))
    else:
        console.print(show(found, opened.failures(), opened.uri))


@app.command()
def rank(
    run: RunArgument,
    concept: Annotated[str, typer.Argument(help="A noun of the captions, such as dog.")],
    k: Annotated[int, typer.Option("--k", help="Neurons to show.", min=1)] = 10,
    by: Annotated[str, typer.Option("--by", help="Order by score, specific or share.")] = "score",
    as_json: AsJson = False,
) -> None:
    """Show a concept's neurons, highest first. A rank marked ? is not certified: more --candidates would settle it."""
    from mmray.results.run import open_run
    from mmray.results.terminal import concept_title, ranking

    opened = open_run(run)
    rows = opened.rank(concept, k, by)
    if as_json:
        print(json.dumps(rows.to_pylist(), ensure_ascii=False))
    else:
        console.print(ranking(rows, concept_title(opened, concept)))


@app.command()
def neuron(
    run: RunArgument,
    name: Annotated[str, typer.Argument(metavar="NEURON", help="Layer and unit, such as L7.u89.")],
    as_json: AsJson = False,
) -> None:
    """Show what a neuron writes, which concepts use it, and its highest and lowest examples."""
    from mmray.results.run import open_run
    from mmray.results.terminal import neuron as show

    facts = open_run(run).neuron(name)
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        console.print(show(facts))


@app.command("check-model")
def check_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=describe("model"))],
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show which parts of a model were found, and prove them: exit status 2 names a claim that fails."""
    from mmray.models.loading import load
    from mmray.neurons.checking import check_model as prove
    from mmray.results.model_tree import claims, parts_tree

    loaded = load(model, dtype, trust_remote_code=trust_remote_code)
    checks = prove(loaded)
    parts = loaded.parts
    modules = {name: list(parts.of(name)) for name in ("language", "vision", "projector")}
    if as_json:
        print(json.dumps({"parts": asdict(parts), "checks": [asdict(check) for check in checks]}))
    else:
        title = f"[bold]{escape(model)}[/] [dim]· family {parts.family}[/]"
        console.print(parts_tree(title, modules, parts.final_norm, parts.unembedding, parts.image))
        console.print(claims(checks))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise InputError(f"{model}: not proven: {'; '.join(failed)}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("mmray-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="The first 256 scenes instead of all 1,536.")] = False,
) -> None:
    """Run the whole main job on the embedded model and data: no network, no GPU."""
    from mmray.results.run import open_run
    from mmray.results.terminal import summary

    run_folder = out / ("quick" if quick else "full")
    _say(f"1 census of the demo's scenes on a local Ray → {run_folder}", "bold")
    settings = census_settings(
        {"model": "demo", "data": "demo", "out": str(run_folder), "limit": 256 if quick else None, "shard_size": 256}
    )
    outcome = _run_census(settings)
    run = open_run(run_folder)
    console.print(
        f"  {outcome.samples:,} scenes, {len(run.concepts)} concepts, {sum(run.concepts.values()):,} occurrences, "
        f"{sum(run.info['model']['widths']):,} neurons each, {outcome.seconds:.0f} s"
    )
    _say("2 rankings: which neurons write a noun, and what else they write\n", "bold")
    console.print(summary(run, list(run.concepts)[:3]))
    concept = next(iter(run.concepts))
    first = run.rank(concept, 1)["neuron"][0].as_py()
    _say(f"next: mmray rank {run_folder} {concept} · mmray neuron {run_folder} {first}")
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


def _run_census(settings: CensusSettings) -> Outcome:
    from mmray.cluster.census import run_census
    from mmray.results.progress import follow_progress

    try:
        with follow_progress(Console(stderr=True)) as follow:
            return run_census(settings, follow)
    except KeyboardInterrupt:
        print(f"mmray: stopped; the same command goes on with {settings.out}", file=sys.stderr)
        raise


def _say_outcome(outcome: Outcome) -> None:
    _say(f"{outcome.samples:,} samples in {outcome.seconds:.0f} s → {outcome.out}")
    if outcome.failures:
        _say(f"{outcome.failures:,} samples failed; see: mmray status {outcome.out}", "yellow")
    for number, reason in outcome.shards_aside.items():
        _say(f"shard {number} set aside: {reason}", "red")
    _say(f"next: mmray rank {outcome.out} CONCEPT")


def _say(line: str, style: str | None = None) -> None:
    # A path stays whole at any width, and brackets in it are no markup.
    console.print(line, style=style, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line; bad input is one line on stderr and status 2."""
    try:
        status = app(prog_name="mmray", standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        # Without any arguments the help is shown, and that is all.
        command = error.ctx.command_path if error.ctx else "mmray"
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help" if error.format_message() else "")
    except InputError as error:
        _refuse(str(error))
    except (BrokenPipeError, SystemExit) as error:
        # The reader of a pipe has gone (`mmray rank … | head`): not an error of ours, though typer makes it an exit.
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except OSError as error:
        if error.strerror is None:
            raise
        _refuse(f"{error.filename or 'file system'}: {error.strerror}; mend it and run again")
    raise SystemExit(status)


def _refuse(message: str) -> NoReturn:
    if message:
        print(f"mmray: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(BAD_INPUT) from None
