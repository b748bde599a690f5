"""The command line: parse, call, print. Exit status 0 done, 2 bad input, 3 drift, 4 finished but something failed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mmray.errors import InputError
from mmray.settings import Captions, CensusSettings, Dtype, Score, census_settings, describe

if TYPE_CHECKING:
    from mmray.cluster.census import Outcome

INCOMPLETE = 4
"""Exit status of a run that ended although some samples or shards failed."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Multi-modal neurons of vision-language models, found and ranked as distributed Ray jobs.",
)
console = Console(highlight=False, soft_wrap=False)


def _option(name: str, *flags: str) -> Any:
    return typer.Option(*flags or [f"--{name.replace('_', '-')}"], help=describe(name))


Model = Annotated[str, _option("model")]
Data = Annotated[str, _option("data")]
Out = Annotated[str, _option("out")]
Limit = Annotated[int | None, _option("limit")]
ShardSize = Annotated[int, _option("shard_size")]
BatchSize = Annotated[int, _option("batch_size")]
Workers = Annotated[int | None, _option("workers")]
GpusPerWorker = Annotated[float | None, _option("gpus_per_worker")]
CaptionsFrom = Annotated[Captions, _option("captions")]
Prompt = Annotated[str | None, _option("prompt")]
ScoreName = Annotated[Score, _option("score")]
FoldNorm = Annotated[bool, _option("fold_norm", "--fold-norm")]
TopK = Annotated[int, _option("top_k")]
Candidates = Annotated[int | None, _option("candidates")]
Nouns = Annotated[str, _option("nouns")]
DtypeName = Annotated[Dtype, _option("dtype")]
ImageColumn = Annotated[str | None, _option("image_column")]
CaptionColumn = Annotated[str | None, _option("caption_column")]
IdColumn = Annotated[str | None, _option("id_column")]
LanguageColumn = Annotated[str | None, _option("language_column")]
DomainColumn = Annotated[str | None, _option("domain_column")]
ObjectsColumn = Annotated[str | None, _option("objects_column")]
Address = Annotated[str | None, _option("address")]
TrustRemoteCode = Annotated[bool, _option("trust_remote_code", "--trust-remote-code")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run: a local path or s3://bucket/prefix.")]


def _default(name: str) -> Any:
    return CensusSettings.model_fields[name].default


@app.command()
def census(
    model: Model,
    data: Data,
    out: Out,
    limit: Limit = None,
    shard_size: ShardSize = _default("shard_size"),
    batch_size: BatchSize = _default("batch_size"),
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    captions: CaptionsFrom = "dataset",
    prompt: Prompt = None,
    score: ScoreName = "contribution",
    fold_norm: FoldNorm = False,
    top_k: TopK = _default("top_k"),
    candidates: Candidates = None,
    nouns: Nouns = "auto",
    dtype: DtypeName = "auto",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    id_column: IdColumn = None,
    language_column: LanguageColumn = None,
    domain_column: DomainColumn = None,
    objects_column: ObjectsColumn = None,
    address: Address = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Capture, score, reduce and rank every neuron on image-caption data. Run again, it goes on where it stopped."""
    given = dict(locals())
    given.pop("as_json")
    outcome = _run_census(census_settings(given))
    if as_json:
        print(json.dumps(asdict(outcome)))
    else:
        _say_outcome(outcome)
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


@app.command()
def plan(
    model: Model,
    data: Data,
    out: Out = "runs/plan",
    limit: Limit = None,
    shard_size: ShardSize = _default("shard_size"),
    workers: Workers = None,
    captions: CaptionsFrom = "dataset",
    top_k: TopK = _default("top_k"),
    candidates: Candidates = None,
    nouns: Nouns = "auto",
    dtype: DtypeName = "auto",
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    objects_column: ObjectsColumn = None,
    as_json: AsJson = False,
) -> None:
    """Say what a census would cost: samples, shards, hours, bytes. Nothing is run."""
    from mmray.cluster.census import plan_census
    from mmray.results.terminal import plan as show

    given = dict(locals())
    for name in ("as_json", "plan_census", "show"):
        given.pop(name, None)
    estimate = plan_census(census_settings(given))
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
        title = f"[bold]{model}[/] [dim]· family {parts.family}[/]"
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
    console.print(f"[bold]1[/] census of the demo's scenes on a local Ray → {run_folder}")
    settings = census_settings(
        {"model": "demo", "data": "demo", "out": str(run_folder), "limit": 256 if quick else None, "shard_size": 256}
    )
    outcome = _run_census(settings)
    run = open_run(run_folder)
    console.print(
        f"  {outcome.samples:,} scenes, {len(run.concepts)} concepts, {sum(run.concepts.values()):,} occurrences, "
        f"{sum(run.info['model']['widths']):,} neurons each, {outcome.seconds:.0f} s"
    )
    console.print("[bold]2[/] rankings: which neurons write a noun, and what else they write\n")
    console.print(summary(run, list(run.concepts)[:3]))
    console.print(f"next: mmray rank {run_folder} dog · mmray neuron {run_folder} {_first_neuron(run)}")
    if not outcome.complete:
        raise typer.Exit(INCOMPLETE)


def _first_neuron(run: Any) -> str:
    name: str = run.rank(next(iter(run.concepts)), 1)["neuron"][0].as_py()
    return name


def _run_census(settings: CensusSettings) -> Outcome:
    from mmray.cluster.census import run_census
    from mmray.results.progress import follow_progress

    with follow_progress(Console(stderr=True)) as follow:
        return run_census(settings, follow)


def _say_outcome(outcome: Outcome) -> None:
    console.print(f"{outcome.samples:,} samples in {outcome.seconds:.0f} s → {outcome.out}")
    if outcome.failures:
        console.print(f"{outcome.failures} samples failed; see: mmray status {outcome.out}", style="yellow")
    for number, reason in outcome.shards_aside.items():
        console.print(f"shard {number} set aside: {reason}", style="red")
    console.print(f"next: mmray rank {outcome.out} CONCEPT")


def main() -> None:
    """Run the command line; bad input is one line on stderr and status 2."""
    try:
        app()
    except InputError as error:
        print(f"mmray: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        # The reader of a pipe has gone (`mmray rank … | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
